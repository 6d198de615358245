"""Disks that are full, small or fixed, for a test."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes; a write that begins before them is cut there.

    The kernel refuses this process what is beyond. That is how a full disk behaves, with another
    errno (EFBIG in place of ENOSPC).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A filesystem of its own in a new folder, by ``size=1m`` or ``ro``; skips without root."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root, to mount a filesystem")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
