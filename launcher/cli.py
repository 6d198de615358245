"""``haloformer``: the command line.

Exit codes: 0 done, 2 something to correct in what was given, 1 a fault of ours.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from haloformer import __version__

# Each module has ``add_command(commands)``. Only the one that is asked for is imported: the
# others would bring MLflow or torch along, seconds that `prepare` or `--help` need not wait.
COMMANDS = {
    "prepare": "haloformer.data_pipeline.prepare_cli",
    "data": "haloformer.data_pipeline.data_cli",
    "train": "haloformer.launcher.train_command",
    "checkpoints": "haloformer.launcher.checkpoints_command",
    "sync": "haloformer.launcher.sync",
    "convert": "haloformer.launcher.convert_command",
    "export": "haloformer.launcher.export_command",
    "generate": "haloformer.launcher.generate_command",
    "evaluate": "haloformer.launcher.evaluate_command",
    "doctor": "haloformer.launcher.doctor",
    "bench": "haloformer.launcher.bench_command",
}


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser of one command, or of all when it is none of them."""
    parser = argparse.ArgumentParser(
        prog="haloformer",
        description="Train Longformer and LED on long documents, the sequence sharded over ranks.",
        epilog="example: haloformer train enwiki_mlm --ranks 2",
    )
    parser.add_argument("--version", action="version", version=f"haloformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        if wanted not in COMMANDS or name == wanted:
            importlib.import_module(module).add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code; a ValueError is the user's to correct and becomes one line.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser(words[0] if words else None).parse_args(words)
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
