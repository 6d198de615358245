"""``haloformer convert``: a short model of transformers becomes a long one."""

from __future__ import annotations

import argparse
from pathlib import Path

# What the models of the papers have: positions and two-sided window.
_PAPER = {"roberta": (4096, 512), "bart": (16384, 1024)}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``convert``."""
    parser = commands.add_parser(
        "convert",
        help="RoBERTa to Longformer, BART to LED",
        description="Make a Longformer of a RoBERTa or an LED of a BART: positions are repeated, "
        "queries, keys and values copied for the global tokens. Both folders are transformers' "
        "(config.json and safetensors); tokenizer files come along.",
        epilog="example: haloformer convert roberta-base longformer --max-positions 4096 "
        "--attention-window 512",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the short model")
    parser.add_argument("target", metavar="DST", type=Path, help="new folder")
    parser.add_argument(
        "--max-positions",
        type=int,
        help="tokens that the new model can read (default 4096 for RoBERTa, 16384 for BART)",
    )
    parser.add_argument(
        "--attention-window",
        type=int,
        help="two-sided window of every layer (default 512 for RoBERTa, 1024 for BART)",
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0."""
    # torch takes seconds to load: only the commands that compute wait for it.
    from haloformer.data_pipeline.files import check_free_disk
    from haloformer.launcher.new_folder import new_folder, refuse_existing
    from haloformer.model.conversion import convert_folder
    from haloformer.model.hf_folder import read_config

    source, target = arguments.source, arguments.target
    refuse_existing(target)
    positions, window = _PAPER.get(str(read_config(source).get("model_type")), (4096, 512))
    if arguments.max_positions is not None:
        positions = arguments.max_positions
    if arguments.attention_window is not None:
        window = arguments.attention_window
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    check_free_disk(target, size + size // 2)  # the global projections, the longer table
    print(f"reading {source} ({size / 2**20:.0f} MiB)", flush=True)
    with new_folder(target) as scratch:
        convert_folder(source, scratch, positions, window)
    print(f"wrote {target}: {positions} positions, window {window}", flush=True)
    return 0
