"""Where the files of a data set lie: a local folder, or a server read by ranges through a cache.

read_range("shard-000003.tar", 2_500_000, 900)       blocks of 1 MiB
memory (64 blocks) -> cache folder (checked) -> server (one range request)
block 2: bytes 2 MiB .. 3 MiB - 1
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from haloformer.configs.schema import CacheConfig
from haloformer.data_pipeline.cache import BlockCache
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.remote import RemoteFiles, split_address
from haloformer.data_pipeline.retry import RetryPolicy

_MAX_FILES = 32
_BLOCK_BYTES = 1 << 20
_MEMORY_BLOCKS = 64
_CHUNK = 1 << 20


class Store(Protocol):
    """The files of a data set by name. Names come checked, from the index."""

    @property
    def folder(self) -> Path | str:
        """A path, or the address of a remote folder."""

    @property
    def is_remote(self) -> bool:
        """Whether every question takes a trip over the network."""

    def place(self, name: str) -> Path | str:
        """How messages name a file."""

    def read(self, name: str) -> bytes:
        """A small file, from its source. FileNotFoundError: there is none."""

    def read_known(self, name: str) -> bytes:
        """A whole file that the index knows. FileNotFoundError: there is none."""

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of such a file, fewer where it ends before. OSError: it cannot be read."""

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes from their source, never from a cache."""

    def size(self, name: str) -> int:
        """Bytes of a file. FileNotFoundError: there is none."""

    def forget(self, name: str, offset: int, size: int) -> bool:
        """Drop what is cached of a range; False where nothing is, so that reading again is vain."""

    def pin(self, content: str, sizes: Mapping[str, int]) -> None:
        """Say what the files are, once the index is known.

        Args:
            content: Hash of the index: cached blocks are of this content, wherever it lies.
            sizes: Bytes of every file that is read by ranges.
        """

    def local_folder(
        self, name: str, files: Sequence[str]
    ) -> contextlib.AbstractContextManager[Path]:
        """A small folder as a local one: those of its files that there are."""

    def close(self) -> None:
        """Let go of files; they are opened again when asked for."""


def open_store(
    address: Path | str, cache: CacheConfig | None = None, policy: RetryPolicy | None = None
) -> Store:
    """The store of a data set; nothing is read yet.

    Args:
        address: A path, ``file:``, ``http(s)://`` or ``s3://``.
        cache: For a remote one: where blocks are kept, and how many.
        policy: For a remote one: how often a request is tried.

    Raises:
        DataError: If the address is of another kind, or the cache folder cannot be made.
    """
    parts = split_address(address)
    if isinstance(parts, Path):
        return LocalStore(parts)
    chosen = CacheConfig() if cache is None else cache
    folder = (
        Path.home() / ".cache" / "haloformer" / "blocks"
        if chosen.path is None
        else Path(chosen.path)
    )
    try:
        blocks = BlockCache(folder, chosen.limit_mib << 20)
    except OSError as fault:
        raise DataError(
            f"cannot hold the cache of remote data ({fault.strerror})",
            file=folder,
            remedy="name another folder with data.cache.path",
        ) from fault
    return RemoteStore(RemoteFiles(parts, RetryPolicy() if policy is None else policy), blocks)


class LocalStore:
    """Files of a folder on this machine, read by ``pread``; the last few stay open."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()

    def place(self, name: str) -> Path:
        """The file."""
        return self.folder / name

    def read(self, name: str) -> bytes:
        """A whole file."""
        return (self.folder / name).read_bytes()

    def read_known(self, name: str) -> bytes:
        """A whole file."""
        return self.read(name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """One system call."""
        return os.pread(self._open(name), size, offset)

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """The file in chunks."""
        with (self.folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return (self.folder / name).stat().st_size

    def forget(self, name: str, offset: int, size: int) -> bool:
        """There is no cache."""
        return False

    def pin(self, content: str, sizes: Mapping[str, int]) -> None:
        """There is no cache."""

    def local_folder(
        self, name: str, files: Sequence[str]
    ) -> contextlib.AbstractContextManager[Path]:
        """The folder itself."""
        return contextlib.nullcontext(self.folder / name)

    def close(self) -> None:
        """Close the open files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, name: str) -> int:
        descriptor = self._files.get(name)
        if descriptor is None:
            if len(self._files) >= _MAX_FILES:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            self._files[name] = descriptor
        self._files.move_to_end(name)
        return descriptor


class RemoteStore:
    """Files of a server, in blocks; several threads may read.

    Args:
        files: The server's folder.
        cache: Blocks of this host.
        block_bytes: Size of a block, and of a request.
    """

    is_remote = True

    def __init__(
        self, files: RemoteFiles, cache: BlockCache, block_bytes: int = _BLOCK_BYTES
    ) -> None:
        self._remote, self._cache, self._block_bytes = files, cache, block_bytes
        self._content, self._sizes = "", dict[str, int]()
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._takes_ranges = False

    @property
    def folder(self) -> str:
        """The address."""
        return self._remote.address

    def place(self, name: str) -> str:
        """The file's address."""
        return f"{self._remote.address}/{name}"

    def pin(self, content: str, sizes: Mapping[str, int]) -> None:
        """Say what the files are."""
        self._content, self._sizes = content, dict(sizes)

    def read(self, name: str) -> bytes:
        """A small file, from the server; the first one also shows whether it serves ranges."""
        content = self._remote.read(name)
        if not self._takes_ranges and len(content) > 1:
            self._remote.read_range(name, 0, 1)
            self._takes_ranges = True
        return content

    def read_known(self, name: str) -> bytes:
        """A whole file, through the cache."""
        return self.read_range(name, 0, self._sizes[name])

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a file, block by block."""
        width = self._block_bytes
        end = min(offset + size, self._sizes[name])
        pieces = []
        for number in range(offset // width, -(-end // width)):
            start = number * width
            block = self._block(name, number)
            pieces.append(block[max(0, offset - start) : end - start])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """The file as the server has it."""
        yield from self._remote.stream(name, size)

    def size(self, name: str) -> int:
        """Bytes of the file as the server says."""
        return self._remote.size(name)

    def forget(self, name: str, offset: int, size: int) -> bool:
        """Drop the blocks of a range, from memory and disk."""
        for number in range(offset // self._block_bytes, -(-(offset + size) // self._block_bytes)):
            key = self._key(name, number)
            with self._lock:
                self._memory.pop(key, None)
            self._cache.drop(key)
        return True

    @contextlib.contextmanager
    def local_folder(self, name: str, files: Sequence[str]) -> Iterator[Path]:
        """A copy, for as long as the context lasts."""
        with tempfile.TemporaryDirectory() as scratch:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    Path(scratch, file).write_bytes(self._remote.read(f"{name}/{file}"))
            yield Path(scratch)

    def close(self) -> None:
        """Forget the blocks in memory."""
        with self._lock:
            self._memory.clear()

    def _key(self, name: str, number: int) -> str:
        # Of the content, not the address: a copy elsewhere has the same blocks, and data that
        # was prepared again has others.
        return BlockCache.key_of(self._content, name, self._block_bytes, number)

    def _block(self, name: str, number: int) -> bytes:
        key = self._key(name, number)
        with self._lock:
            block = self._memory.get(key)
            if block is not None:
                self._memory.move_to_end(key)
                return block
        block = self._cache.get(key)
        if block is None:
            with self._cache.filling(key):
                block = self._cache.get(key)  # another rank may have been quicker
                if block is None:
                    block = self._fetch(name, number, key)
        with self._lock:
            self._memory[key] = block
            while len(self._memory) > _MEMORY_BLOCKS:
                self._memory.popitem(last=False)
        return block

    def _fetch(self, name: str, number: int, key: str) -> bytes:
        start = number * self._block_bytes
        stop = min(start + self._block_bytes, self._sizes[name])
        block = self._remote.read_range(name, start, stop)
        if len(block) < stop - start:  # cut on the way, or on the server: a second look tells
            block = self._remote.read_range(name, start, stop)
        if len(block) == stop - start:
            self._cache.put(key, block)
        return block
