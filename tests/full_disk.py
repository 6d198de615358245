"""A disk that is full, without one: the kernel refuses this process all bytes behind a limit."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes; a write that begins before them is cut there.

    That is how a full disk behaves, with another errno (EFBIG in place of ENOSPC).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
