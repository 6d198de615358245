"""A bounded folder of blocks that were read from far away, shared by all ranks of a host.

    cache/ledger              bytes in use, in decimal; whoever adds a block holds its lock
          locks/3f            held while a block whose key starts so is fetched: once per host
          3f/3fa09c...        sha256 of key and content, then the content

Nothing in it is trusted: a block whose checksum is wrong counts as absent and is fetched again. Nor
is it needed: where it cannot be read or written, that is said once, and blocks are fetched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_LEDGER_BYTES = 20
_KEPT = 0.9  # of the limit, when there is no room: not every block then has to look at all


class BlockCache:
    """Blocks by key, the least recently used ones dropped.

    Args:
        folder: Where they lie; it is made. Nothing else may lie in it.
        limit: Bytes that all blocks together never pass.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        (folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._warned = False
        with self._ledger() as ledger:  # a smaller limit than last time takes effect at once
            _write_total(ledger, self._make_room(0))

    @staticmethod
    def key_of(*parts: str | int) -> str:
        """A key: the hash of what names a block, so that no name can lead out of the folder."""
        return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()

    def get(self, key: str) -> bytes | None:
        """A block as it was put, None if it is not there or damaged."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            content = stored[_DIGEST_BYTES:]
            if stored[:_DIGEST_BYTES] != _digest(key, content):
                path.unlink()
                return None
            os.utime(path)  # what is used stays
        except FileNotFoundError:  # dropped just now, by another rank
            return None
        except OSError as fault:
            self._warn(fault)
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep a block. A full disk is no reason to stop: it is then not kept."""
        size = _DIGEST_BYTES + len(content)
        if size > self._limit:
            return
        path = self._path(key)
        temporary = path.with_name(f"{key}.tmp")  # one at a time, by the lock
        try:
            with self._ledger() as ledger:
                total = _read_total(ledger)
                if total is None or total + size > self._limit:
                    total = self._make_room(size)
                # First the ledger: killed in between, it says too much, never too little.
                _write_total(ledger, total + size)
                path.parent.mkdir(mode=0o700, exist_ok=True)
                temporary.write_bytes(_digest(key, content) + content)
                temporary.replace(path)
        except OSError as fault:
            self._warn(fault)

    def drop(self, key: str) -> None:
        """Forget a block."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as fault:
            self._warn(fault)

    @contextlib.contextmanager
    def filling(self, key: str) -> Iterator[None]:
        """Keep the other ranks from fetching the same block; look for it once more inside."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_locked(self._folder / "locks" / key[:2]))
            except OSError as fault:  # then several ranks fetch it
                self._warn(fault)
            yield

    def _warn(self, fault: OSError) -> None:
        """Tell the first fault: what is wrong with one block is wrong with all."""
        if not self._warned:
            _log.warning(
                "cache %s: blocks cannot be kept there (%s) and are fetched again; see to its "
                "disk, or name another folder with data.cache.path",
                self._folder,
                fault,
            )
        self._warned = True

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        with _locked(self._folder / "ledger") as descriptor:
            yield descriptor

    def _make_room(self, size: int) -> int:
        """Count the blocks and, if ``size`` more is too much, drop the oldest; bytes that stay."""
        found = []
        for folder in self._folder.iterdir():
            if len(folder.name) == 2:
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(entry[1] for entry in found)
        if total + size <= self._limit:
            return total
        for _, num_bytes, path in sorted(found):
            if total + size <= self._limit * _KEPT or total == 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= num_bytes
        return total


def _digest(key: str, content: bytes) -> bytes:
    # With the key, so that a block under another's name does not pass for it.
    return hashlib.sha256(key.encode() + content).digest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a lock file; the kernel lets go of it when the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_total(ledger: int) -> int | None:
    text = os.pread(ledger, _LEDGER_BYTES, 0)
    return int(text) if len(text) == _LEDGER_BYTES and text.isdigit() else None


def _write_total(ledger: int, total: int) -> None:
    os.pwrite(ledger, f"{total:0{_LEDGER_BYTES}}".encode(), 0)
