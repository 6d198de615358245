"""``haloformer export``: a checkpoint of a run as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from haloformer.configs.sizes import num_parameters
from haloformer.data_pipeline.files import check_free_disk
from haloformer.data_pipeline.tokenizer_json import write_for_transformers
from haloformer.launcher.new_folder import new_folder, refuse_existing


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``export``."""
    parser = commands.add_parser(
        "export",
        help="write a trained model as a transformers folder",
        description="Write the newest whole checkpoint of a run (longformer_mlm, "
        "longformer_classifier, longformer_qa or led) as a folder with config.json, "
        "model.safetensors and the tokenizer. transformers loads it and computes the same logits.",
        epilog="example: haloformer export latest my-longformer --step 300",
    )
    parser.add_argument("run", metavar="RUN_ID|latest")
    parser.add_argument("target", metavar="DST", type=Path, help="new folder")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: newest)")
    add_run_options(parser)
    parser.set_defaults(run_command=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads the model of a run."""
    parser.add_argument("--data", help="where the run's training data is, if it moved")
    parser.add_argument(
        "--experiment", help="where to look for the latest run (default: haloformer)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0."""
    # torch takes seconds to load, which a wrong word above need not wait for.
    from haloformer.launcher.load_model import find_checkpoint, load_found
    from haloformer.model.convert import save_pretrained

    target = arguments.target
    refuse_existing(target)
    found = find_checkpoint(arguments.run, arguments.step, arguments.experiment)
    print(f"run {found.catalog.run_id}, step {found.manifest.step}: loading", flush=True)
    trained = load_found(found, arguments.data)
    vocab_size = trained.model.raw_config["vocab_size"]
    check_free_disk(target, 4 * num_parameters(trained.config.model, vocab_size))
    with new_folder(target) as scratch:
        save_pretrained(trained.model, scratch)
        write_for_transformers(trained.tokenizer, scratch, trained.longest_input)
    kind = {"byte": "bytes", "bpe": "byte-level BPE"}[trained.tokenizer.kind]
    architecture = trained.model.raw_config["architectures"][0]
    print(f"wrote {target}: {architecture}, tokenizer: {kind} ({vocab_size} tokens)", flush=True)
    return 0
