"""``haloformer plan``: what a recipe will take on a cluster, before anything is rented."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from haloformer.configs.load import check_world, load_config
from haloformer.configs.schema import TrainConfig
from haloformer.configs.sizes import num_parameters
from haloformer.launcher.plan_devices import DEVICES, Shares
from haloformer.launcher.plan_layouts import Cluster, Judged, judge, ranked, scaling, why
from haloformer.launcher.plan_model import model_of, split_of
from haloformer.launcher.plan_picture import picture, write_png
from haloformer.launcher.plan_report import layout_json, phase_json, text
from haloformer.launcher.plan_time import rank_flops

_SHOWN = 8
_EPILOG = """example: haloformer plan wiki_led --world 16 --device h100 --json plan.json

The JSON has: name, parameters, precision, world, device, assumptions, phases (one object per line
of the schedule), recipe and layouts (objects with data, context, tensor, zero_stage, recompute,
micro_batch, accumulation, fits, peak_bytes, peak_moment, memory_bytes by kind, link_bytes by kind
with node and network, step_seconds, seconds, tokens_per_second), why, flops_per_step, mfu,
weak_scaling. Sizes are bytes, times seconds. Memory, bytes and time are of the longest phase."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``plan``."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic and speed of a recipe on a cluster, from formulas",
        description="Say what a recipe will take on a cluster, and which layout suits it best.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    parser.add_argument("--world", type=int, required=True, help="devices in all")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="devices of a node")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--vocab", type=int, help="entries of the vocabulary (default: the data's)")
    parser.add_argument("--globals", type=int, help="global tokens per sequence (default: 1 or 0)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the forecast there as well"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the layout there")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {arguments.gpus_per_node} is less than 1")
    check_world(config, arguments.world)
    for path in (arguments.json, arguments.png):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} in; make it")
    vocab = _vocab(config) if arguments.vocab is None else arguments.vocab
    if vocab < 1:
        raise ValueError(f"--vocab {vocab} is less than 1")
    shortest = min(phase.config.data.seq_len for phase in config.all_phases())
    num_globals = arguments.globals
    if num_globals is None:
        num_globals = int(config.data.global_tokens == "first")
    if not 0 <= num_globals <= shortest:
        raise ValueError(
            f"--globals {num_globals} is no number of tokens of a sequence; give 0 to {shortest}"
        )
    device = DEVICES[arguments.device]
    cluster = Cluster(arguments.world, arguments.gpus_per_node, device, Shares())
    report, own = forecast(config, vocab, num_globals, cluster)
    for line in (*text(report, cluster), "", *picture(own, cluster.per_node)):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.png is not None:
        fault = write_png(own, cluster.per_node, arguments.png)
        print(f"picture      {arguments.png if fault is None else fault}")
    return 0


def forecast(
    config: TrainConfig, vocab: int, num_globals: int, cluster: Cluster
) -> tuple[dict[str, Any], Judged]:
    """The whole report, ready for JSON, and the recipe's own layout in it.

    Args:
        config: Recipe.
        vocab: Entries of the vocabulary.
        num_globals: Global tokens per sequence.
        cluster: What is to be rented.
    """
    phases = config.all_phases()
    longest = max((phase.config for phase in phases), key=lambda one: one.data.seq_len)
    model, split = model_of(longest.model, vocab), split_of(longest, cluster.world)
    own = judge(longest, model, split, num_globals, cluster)
    found = ranked(longest, model, split, num_globals, cluster)
    shown = found[:_SHOWN]
    if own.fits and own.split not in [one.split for one in shown]:
        shown.append(next(one for one in found if one.split == own.split))
    flops = 3.0 * rank_flops(model, own.rows, split) * own.accumulation * cluster.world
    table = scaling(longest, model, own, num_globals, cluster)
    peak = cluster.device.peak(split.width) * cluster.world
    report = {
        "name": config.name,
        "parameters": num_parameters(config.model, vocab),
        "precision": config.parallel.precision,
        "world": cluster.world,
        "device": asdict(cluster.device),
        "assumptions": asdict(cluster.shares),
        "phases": [phase_json(phase) for phase in phases],
        "recipe": layout_json(own, cluster.per_node),
        "flops_per_step": flops,
        "mfu": flops / own.time.total / peak,
        "layouts": [
            layout_json(one, cluster.per_node) | {"is_recipe": one.split == own.split}
            for one in shown
        ],
        "why": why(found[0], own) if found else "no layout fits this device",
        "weak_scaling": _table(table, longest, own),
    }
    return report, own


def _table(table: list[Judged], config: TrainConfig, own: Judged) -> list[dict[str, Any]]:
    per_data = config.batch.global_batch // own.split.data
    return [
        {
            "world": one.split.world,
            "global_batch": per_data * one.split.data,
            "step_seconds": one.time.total,
            "tokens_per_second": one.tokens_per_second,
            "efficiency": table[0].time.total / one.time.total,
        }
        for one in table
    ]


def _vocab(config: TrainConfig) -> int:
    from haloformer.data_pipeline.index import load_index

    try:
        return load_index(config.data.corpora[0].path, config.data.cache).vocab_size
    except ValueError as error:
        raise ValueError(f"{error}; or give --vocab, and no data is looked at") from error
