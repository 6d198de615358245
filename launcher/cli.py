"""``haloformer``: the command line.

Exit codes: 0 done, 2 something to correct in what was given, 1 a fault of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from haloformer import __version__
from haloformer.data_pipeline import prepare_cli
from haloformer.launcher import checkpoints_command, doctor, train_command


def build_parser() -> argparse.ArgumentParser:
    """All commands; each brings its arguments and its function along."""
    parser = argparse.ArgumentParser(
        prog="haloformer",
        description="Train Longformer on long documents, with the sequence sharded over ranks.",
        epilog="example: haloformer train enwiki_mlm --ranks 2",
    )
    parser.add_argument("--version", action="version", version=f"haloformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="turn text into tar shards of tokens")
    prepare_cli.add_arguments(prepare)
    prepare.set_defaults(run_command=prepare_cli.run)
    for module in (train_command, checkpoints_command, doctor):
        module.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code; a ValueError is the user's to correct and becomes one line.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run_command(arguments)
    except ValueError as error:
        print(f"haloformer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("haloformer: stopped", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
