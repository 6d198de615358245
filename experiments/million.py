"""A training step on one sequence of 1,048,576 tokens, over four ranks; the curve from 16K to it.

The model is a Longformer MLM of 2 layers, 64 wide, that sees 128 tokens to either side and one
global token. Its table of 4,096 positions is used over and over: a row per token would be 256 MiB
of weights at a million, with their gradient whole on every rank. Tokens are bytes.

Must hold, beside the same loss on one rank and on all:

    growth of a rank's memory      a quarter of one rank's at the same length, within 10 %
    the same at the longest        that of one rank at a quarter of it, within 10 %
    halo bytes of every rank       at every length those of the shortest

Growth is the peak of a step beyond the built model and engine; freed blocks go back to the system
at once. One rank alone stops where memory would run out.

    python experiments/million.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling import RESULTS, Curve, Panel, Rule, draw, finish

from haloformer.launcher.bench_step_cases import StepCase
from haloformer.launcher.bench_step_contender import (
    Contender,
    Setup,
    StepBenchError,
    no_room_for,
)

_LENGTHS = tuple(1 << power for power in range(14, 21))
_CASE = StepCase("mlm", 0, 0, 2, 64, 2, 256, 256, 261, "none", position_rows=4096)
_STEPS = 2  # only the second has the optimizer's state beside its activations
_WITHIN = 0.1
_LIMIT_S = 3600.0

Point = dict[str, Any]


def measure(tokens: int, ranks: int) -> Point:
    """The last of a few steps at one length: time, and each rank's memory and halo."""
    setup = Setup("ours", ranks=ranks, thrifty=True, seconds=_LIMIT_S)
    with Contender(setup, replace(_CASE, tokens=tokens)) as contender:
        for _ in range(_STEPS):
            found = contender.step()
    seconds = max(rank["seconds"] for rank in found)
    keys = ("step_growth_mib", "peak_rss_mib", "halo_bytes")
    point = {
        "tokens": tokens,
        "ranks": ranks,
        "seconds": seconds,
        "microseconds_per_token": 1e6 * seconds / tokens,
        "loss": found[0]["loss"],
        **{key: [rank[key] for rank in found] for key in keys},
    }
    print(
        f"{tokens:>9} tokens, {ranks} rank{'s' * (ranks > 1)}: {seconds:7.2f} s, growth "
        f"{growth(point):8.1f} MiB per rank, halo {point['halo_bytes']} bytes, "
        f"loss {point['loss']:.4f}",
        flush=True,
    )
    return point


def growth(point: Point) -> float:
    """Of the larger rank, in MiB."""
    return float(max(point["step_growth_mib"]))


def measure_all(lengths: Sequence[int], ranks: int) -> tuple[list[Point], list[str]]:
    """Both layouts at every length, the shortest first; one rank as far as memory goes.

    Returns:
        What was measured, and a sentence on each measurement that failed.
    """
    points: list[Point] = []
    faults: list[str] = []
    for tokens in lengths:
        # The last length of one rank tells what the next one needs.
        expected = [growth(p) * tokens / p["tokens"] for p in points if p["ranks"] == 1]
        no_room = no_room_for(expected[-1]) if expected else None
        if no_room is not None:
            print(f"{tokens:>9} tokens, 1 rank: left out, {no_room}", flush=True)
        for count in (1, ranks) if no_room is None else (ranks,):
            try:
                points.append(measure(tokens, count))
            except StepBenchError as error:  # the other points are worth having
                faults.append(f"{tokens} tokens, ranks {count}: {error}")
                print(faults[-1], flush=True)
    return points, faults


def rules_of(points: Sequence[Point], ranks: int) -> list[Rule]:
    """What must hold of the points."""
    alone = {p["tokens"]: p for p in points if p["ranks"] == 1}
    split = {p["tokens"]: p for p in points if p["ranks"] == ranks}
    found = []
    most = max(alone.keys() & split.keys())
    share = growth(split[most]) / growth(alone[most]) * ranks
    label = f"{ranks} x growth per rank over one rank's, both at {most}"
    found.append(Rule(f"{label}, within {_WITHIN:g} of 1", share, abs(share - 1) <= _WITHIN))
    longest = max(split)
    if longest // ranks in alone:
        same = growth(split[longest]) / growth(alone[longest // ranks])
        label = f"growth per rank at {longest} over one rank's at {longest // ranks}"
        found.append(Rule(f"{label}, within {_WITHIN:g} of 1", same, abs(same - 1) <= _WITHIN))
    shortest = split[min(split)]["halo_bytes"]
    others = sum(p["halo_bytes"] != shortest for p in split.values())
    found.append(Rule(f"lengths whose halo is not {shortest} bytes by rank", others, others == 0))
    apart = max(abs(split[n]["loss"] / alone[n]["loss"] - 1) for n in alone.keys() & split.keys())
    found.append(Rule("loss of all ranks off that of one, <= 1e-5", apart, apart <= 1e-5))
    return found


def picture(points: Sequence[Point], ranks: int, path: Path) -> None:
    """Time and memory over the length."""
    names = {1: "one rank", ranks: f"{ranks} ranks"}
    rows = {name: [p for p in points if p["ranks"] == count] for count, name in names.items()}

    def curves(value: str) -> list[Curve]:
        return [
            Curve(name, [p["tokens"] for p in own], [_worst(p[value]) for p in own])
            for name, own in reversed(rows.items())
        ]

    panels = [
        Panel("microseconds per token", curves("microseconds_per_token"), slope=0),
        Panel("growth of memory per rank, MiB", curves("step_growth_mib")),
    ]
    draw("a training step: 2 layers x 64, 128 tokens to either side", panels, path)


def _worst(value: float | list[float]) -> float:
    return max(value) if isinstance(value, list) else value


def main() -> int:
    """Run it; the exit code is 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=_LENGTHS, help="lengths")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and PNG")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)  # now, and not when all is measured
    lengths, ranks = sorted(arguments.tokens), arguments.ranks
    points, faults = measure_all(lengths, ranks)
    picture(points, ranks, arguments.output / "million.png")
    case = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 256, "one_sided_window": 128}
    case |= {"global_tokens": 1, "vocab": 261, "position_rows": 4096, "threads_per_rank": 1}
    record = {"model": case, "ranks": ranks, "points": points, "failed": faults}
    rules = [*rules_of(points, ranks), Rule("failed", len(faults), not faults)]
    return finish("million", arguments.output, record, rules)


if __name__ == "__main__":
    sys.exit(main())
