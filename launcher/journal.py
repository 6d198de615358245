"""Records at the end of a file, kept in memory for as long as the disk refuses them."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class Journal:
    """A file of one JSON object per line, to which threads and processes add.

    A full disk, or one that is away, is no reason for a run to end: what it refuses waits, and goes
    into the file in order with the next record that it takes.

    Args:
        path: The file; made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._adding = threading.Lock()
        self._waiting: list[bytes] = []
        self._warned = False

    def add(self, record: dict[str, Any]) -> None:
        """Add a record, now or as soon as the disk takes it."""
        line = (json.dumps(record) + "\n").encode()
        with self._adding:
            self._waiting.append(line)
            self._write_waiting()

    def flush(self) -> None:
        """Try once more to write what waits."""
        with self._adding:
            self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                _append(self._path, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if not self._warned:
                _log.warning("%s; records wait in memory until it can be written", error)
            self._warned = True
        else:
            self._warned = False


def records_of(path: Path) -> list[dict[str, Any]]:
    """All whole records of a journal, oldest first; empty if there is no file yet."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [record for line in file if (record := parse_line(line)) is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A record, None for a line that a crash or a full disk cut short."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        # A process that died in the middle of a line, or a full disk, left no end to it.
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        text = (b"\n" if cut else b"") + line
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError as error:
        if error.filename is None:  # calls on descriptors do not know it
            error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
