"""``haloformer data``: look after data sets that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import INDEX_NAME
from haloformer.data_pipeline.reader import verify
from haloformer.data_pipeline.remote import RemoteFiles, split_address
from haloformer.data_pipeline.retry import RetryPolicy

_PARTS = ("train", "eval", "test")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``data``."""
    parser = commands.add_parser("data", help="check data sets made by prepare")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "verify",
        help="compare every byte with the hashes of the index",
        description="Compare every byte of data sets with the hashes of their indexes. Exit code "
        "2 if one is damaged; every damaged data set is named.",
        epilog="example: haloformer data verify data/enwiki",
    )
    check.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="what prepare made, or a part of it; a path, http(s):// or s3://",
    )
    check.set_defaults(run_command=run_verify)


def run_verify(arguments: argparse.Namespace) -> int:
    """Run ``data verify``; returns 0, or 2 if a data set is damaged."""
    faults = 0
    for given in arguments.folders:
        try:
            folders = data_sets(given)
        except DataError as error:
            print(f"haloformer: error: {error}", file=sys.stderr)
            faults += 1
            continue
        faults += sum(not _verify(folder) for folder in folders)
    return 2 if faults else 0


def _verify(folder: str) -> bool:
    """Check one data set and say how it is."""
    try:
        index = verify(folder, _progress(folder) if sys.stderr.isatty() else None)
    except DataError as error:
        print(f"haloformer: error: {error}", file=sys.stderr)
        return False
    print(
        f"{folder}: {len(index.shards)} shards, {index.num_samples} {index.content}, "
        f"{index.num_tokens} tokens, as they were written"
    )
    return True


def data_sets(folder: str) -> list[str]:
    """The data sets in a folder that prepare made, or the folder if it is one itself."""
    parts = [f"{folder.rstrip('/')}/{part}" for part in _PARTS]
    if _is_data_set(folder):
        return [folder]
    return [part for part in parts if _is_data_set(part)] or [folder]


def _is_data_set(folder: str) -> bool:
    place = split_address(folder)
    if isinstance(place, Path):
        return (place / INDEX_NAME).exists()
    try:
        RemoteFiles(place, RetryPolicy()).read(INDEX_NAME)
    except FileNotFoundError:
        return False
    return True


def _progress(folder: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{folder}: {100 * done // max(total, 1)} %", end=end, file=sys.stderr, flush=True)

    return show
