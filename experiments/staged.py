"""Staged training against a single stage, at equal tokens: bits per character, and the time taken.

    python experiments/staged.py --seeds 1 2 3

Both see 300 steps of 4,096 characters with the same learning rates. ``staged`` trains 180 steps on
sequences of 256, 75 on 512 and 45 on 1,024, its windows doubling along; ``single`` has sequences
of 1,024 and the last windows from the start. Both are measured as they end: at 1,024.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from arms import WORK, Arm, Outcome, held_out, parse_arguments, report, run_arms
from enwiki6 import prepare_bytes

ARMS = (Arm("single", "single"), Arm("staged", "staged"))


def main() -> None:
    arguments = parse_arguments(__doc__)
    prepare_bytes()
    outcomes = run_arms("staged", ARMS, arguments.seeds, arguments.jobs, score)
    report("staged", outcomes, "held-out bits per character")
    for arm in ARMS:
        times = [seconds(arm.name, seed) for seed in arguments.seeds]
        print(f"{arm.name}: {fmean(times):.0f} s in training steps (mean over seeds)")


def score(folder: Path, arm: Arm, seed: int) -> Outcome:
    """The held-out loss at the last step."""
    return Outcome(arm.name, seed, held_out(folder, "eval_bits_per_char")[-1][1], [])


def seconds(arm: str, seed: int) -> float:
    """Time spent in training steps."""
    (file,) = (WORK / "staged" / f"{arm}-{seed}" / "runs").glob("*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return sum(record.get("step_seconds", 0.0) for record in records)


if __name__ == "__main__":
    main()
