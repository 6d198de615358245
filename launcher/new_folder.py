"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from haloformer.launcher.artifacts import sync_folder


def refuse_existing(target: Path) -> None:
    """See that a folder can be made: it is not there, or empty.

    Raises:
        ValueError: If something is there.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise ValueError(f"{target}: is there already and not empty; name a new folder")
    elif target.exists() or target.is_symlink():
        raise ValueError(f"{target}: is there already and no folder; name a new one")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target`` when the block ends well, and else is deleted.

    ::

        out/.long.4711.part/config.json ...    while it is written
        out/long/config.json ...               one rename later

    Args:
        target: Not there, or an empty folder; folders above it are made.

    Raises:
        ValueError: If something is there, or nothing can be written there.
    """
    refuse_existing(target)
    scratch = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{target}: cannot be made ({error}); name another folder") from error
    try:
        yield scratch
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(scratch)
        scratch.rename(target)  # takes the place of an empty folder
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
