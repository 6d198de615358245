"""Figure 3's order: an LED fed 16K tokens beats one fed 1K where the answer lies late.

    python experiments/figure3.py --seeds 1 2 3

Both train on the same 2,400 pairs (see ``late_evidence``), sources of 700 to 16,000 tokens whose
last 600 tell what the answer is; the 40 held-out sources have more than 4,600. Beside them the
first three sentences of the source. The paper's figures are those of LED-base on arXiv, validation
ROUGE-1: 35.21 with 1K, 44.48 with 4K, 46.23 with 16K.
"""

from __future__ import annotations

import json
from pathlib import Path

from arms import WORK, Arm, Outcome, haloformer, parse_arguments, report, run_arms
from enwiki6 import fetch_dump
from late_evidence import write_pairs

LEAD = "first 3 sentences"
ARMS = (
    Arm("1K", "figure3", ("data.seq_len=1024",)),
    Arm("16K", "figure3"),
)


def main() -> None:
    arguments = parse_arguments(__doc__)
    prepare_pairs()
    outcomes = run_arms("figure3", ARMS, arguments.seeds, arguments.jobs, score)
    leads = [
        Outcome(LEAD, outcome.seed, read_scores(outcome.arm, outcome.seed)[LEAD]["rouge1"], [])
        for outcome in outcomes
        if outcome.arm == ARMS[0].name
    ]
    report("figure3", [*leads, *outcomes], "held-out ROUGE-1 (F1, percent)")


def prepare_pairs() -> None:
    """Make ``work/late/train`` and, with the same tokenizer, ``work/late/held_out``."""
    folder = WORK / "late"
    if not (folder / "held_out.jsonl").exists():
        write_pairs(fetch_dump(folder), folder, num_train=2400, num_held_out=40)
    for name, tokenizer in (("train", "train:1024"), ("held_out", "train/train/tokenizer")):
        words = ["--format", "pairs", "--tokenizer", tokenizer, "--holdout", "0"]
        haloformer(folder, "prepare", "--input", f"{name}.jsonl", *words, "--output", name)


def score(folder: Path, arm: Arm, seed: int) -> Outcome:
    """ROUGE-1 of the answers of the trained model."""
    if not (folder / "rouge.json").exists():
        data = "../../late/held_out/train"
        haloformer(folder, "evaluate", "latest", "--data", data, "--json", "rouge.json")
    return Outcome(arm.name, seed, read_scores(arm.name, seed)["model"]["rouge1"], [])


def read_scores(arm: str, seed: int) -> dict[str, dict[str, float]]:
    """What ``haloformer evaluate`` wrote: candidate -> metric -> value."""
    file = WORK / "figure3" / f"{arm}-{seed}" / "rouge.json"
    scores: dict[str, dict[str, float]] = json.loads(file.read_text())["scores"]
    return scores


if __name__ == "__main__":
    main()
