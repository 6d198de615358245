"""What a whole training step costs over the length of the sequence, and the exponent of that.

A Longformer MLM of 2 layers, 256 wide, with a two-sided window of 512 and one global token, on one
rank of two threads, N = 2K, 4K, 8K, 16K and 32K. The lengths take turns, so that noise of the
machine falls on all of them; a point is a median over the rounds. Memory is the growth of a step
beyond the built model and engine, in processes of their own, where freed blocks go back at once.

Must hold: the least-squares line through log(cost) over log(N) has a slope of 1.05 or less, for
time and for memory. What a step costs whatever its length makes the slope smaller, not larger.

    python experiments/linear.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from scaling import RESULTS, Curve, Panel, Rule, draw, exponent, finish

from haloformer.launcher.bench_step_cases import StepCase
from haloformer.launcher.bench_step_contender import Contender, Setup

_LENGTHS = tuple(1 << power for power in range(11, 16))
_CASE = StepCase("mlm", 0, 0, 2, 256, 4, 1024, 512, 261, "none")
_THREADS, _LIMIT = 2, 1.05


def time_steps(lengths: Sequence[int], rounds: int) -> list[list[float]]:
    """Seconds of every timed step by length; a first round is not counted."""
    seconds: list[list[float]] = [[] for _ in lengths]
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(
                Contender(Setup("ours", threads=_THREADS), replace(_CASE, tokens=tokens))
            )
            for tokens in lengths
        ]
        for number in range(rounds + 1):
            latest = [contender.step()[0]["seconds"] for contender in contenders]
            print(f"round {number}: " + "  ".join(f"{x:.2f} s" for x in latest), flush=True)
            if number > 0:
                for own, x in zip(seconds, latest, strict=True):
                    own.append(x)
    return seconds


def weigh(tokens: int) -> float:
    """MiB that a step adds; the second has the optimizer's state beside its activations."""
    with Contender(
        Setup("ours", threads=_THREADS, thrifty=True), replace(_CASE, tokens=tokens)
    ) as c:
        c.step()
        growth = float(c.step()[0]["step_growth_mib"])
    print(f"{tokens} tokens: {growth:.0f} MiB", flush=True)
    return growth


def main() -> int:
    """Run it; the exit code is 1 if a cost grows faster than linearly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=_LENGTHS, help="lengths")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of every length")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and PNG")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)  # now, and not when all is measured
    lengths = sorted(arguments.tokens)
    seconds = time_steps(lengths, arguments.rounds)
    medians = [statistics.median(x) for x in seconds]
    growths = [weigh(tokens) for tokens in lengths]
    rules = []
    for name, costs in (("time", medians), ("memory", growths)):
        slope = exponent(lengths, costs)
        rules.append(Rule(f"exponent of {name} over N <= {_LIMIT}", slope, slope <= _LIMIT))
    panels = [
        Panel("seconds per step", [Curve(f"N^{rules[0].found:.2f}", lengths, medians)]),
        Panel("growth of memory, MiB", [Curve(f"N^{rules[1].found:.2f}", lengths, growths)]),
    ]
    draw("a training step: 2 layers x 256, window 512", panels, arguments.output / "linear.png")
    model = {"layers": 2, "hidden": 256, "heads": 4, "ffn": 1024, "window": 512, "vocab": 261}
    points = [
        {"tokens": n, "seconds": median, "seconds_of_steps": steps, "step_growth_mib": growth}
        for n, median, steps, growth in zip(lengths, medians, seconds, growths, strict=True)
    ]
    record = {"model": model, "threads": _THREADS, "points": points}
    return finish("linear", arguments.output, record, rules)


if __name__ == "__main__":
    sys.exit(main())
