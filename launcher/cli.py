"""``haloformer``: the command line.

Exit codes: 0 done, 2 something to correct in what was given, 1 a fault of ours or of a disk.
"""

from __future__ import annotations

import argparse
import errno
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
    "plan": "haloformer.launcher.plan_command",
    "doctor": "haloformer.launcher.doctor",
    "bench": "haloformer.launcher.bench_command",
}

# A write that finds no room does not say of which file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse, with overrides also behind options: ``train RECIPE --ranks 2 steps=9``.

    argparse takes all positional words in one go, and refuses those that come later.
    """
    arguments, rest = parser.parse_known_args(words)
    overrides: list[str] | None = getattr(arguments, "overrides", None)
    strangers = [w for w in rest if overrides is None or w.startswith("-") or "=" not in w]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if overrides is not None:
        overrides += rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code; a ValueError is the user's to correct and becomes one line, and so does a
        file or a disk that fails.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        # Importing a command takes a second or two, in which Ctrl-C comes as well.
        arguments = parse(build_parser(words[0] if words else None), words)
        code: int = arguments.run_command(arguments)
    except ValueError as error:
        print(f"haloformer: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"haloformer: error: {where}{error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("haloformer: stopped", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
