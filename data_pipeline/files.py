"""Small file helpers: hashes, atomic writes, free disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from haloformer.data_pipeline.errors import DataError

_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent (or the old one) or complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)


def check_free_disk(folder: Path, needed: int) -> None:
    """Refuse to start what cannot fit.

    Args:
        folder: Where it shall be written; the nearest existing parent is asked.
        needed: Estimated bytes.

    Raises:
        DataError: If less is free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"about {needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free",
            file=place,
            remedy="free some disk or choose another output",
        )
