"""``haloformer data``: look after data sets that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import INDEX_NAME
from haloformer.data_pipeline.reader import verify

_PARTS = ("train", "eval")


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
        "folders", nargs="+", type=Path, metavar="DIR", help="what prepare made, or a part of it"
    )
    check.set_defaults(run_command=run_verify)


def run_verify(arguments: argparse.Namespace) -> int:
    """Run ``data verify``; returns 0, or 2 if a data set is damaged."""
    faults = 0
    for folder in [part for given in arguments.folders for part in data_sets(given)]:
        try:
            index = verify(folder, _progress(folder) if sys.stderr.isatty() else None)
        except DataError as error:
            print(f"haloformer: error: {error}", file=sys.stderr)
            faults += 1
            continue
        print(
            f"{folder}: {len(index.shards)} shards, {index.num_samples} {index.content}, "
            f"{index.num_tokens} tokens, as they were written"
        )
    return 2 if faults else 0


def data_sets(folder: Path) -> list[Path]:
    """The data sets in a folder that prepare made, or the folder if it is one itself."""
    found = [folder / part for part in _PARTS if (folder / part).is_dir()]
    return [folder] if (folder / INDEX_NAME).exists() or not found else found


def _progress(folder: Path) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{folder}: {100 * done // max(total, 1)} %", end=end, file=sys.stderr, flush=True)

    return show
