"""Figure 3's order: an LED fed 16K tokens beats one fed 1K where the answer lies late.

    python experiments/figure3.py --seeds 1 2 3

A short LED of 1,024 positions is trained first, as BART comes before the paper's LED, and its
positions are copied to 16,384. From there both arms train on the same 2,400 pairs (see
``late_evidence``), sources of 600 to 15,000 tokens whose last 600 tell what the answer is; the 40
held-out sources have more than 4,600. Beside them the first three sentences of the source.

The paper's figures are those of LED-base on arXiv, validation ROUGE-1: 35.21 with 1K, 44.48 with
4K, 46.23 with 16K.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from arms import HERE, WORK, Arm, Outcome, haloformer, parse_arguments, report, run_arms, train
from enwiki6 import fetch_dump
from late_evidence import write_pairs
from safetensors.torch import load_file, save_file

from haloformer.model.conversion import repeat_positions

LEAD = "first 3 sentences"
POSITIONS, LENGTH = "led.encoder.embed_positions.weight", 16_384
START = "init_from=../long-SEED"
ARMS = (
    Arm("1K", "figure3", (START, "data.seq_len=1024")),
    Arm("16K", "figure3", (START,)),
)


def main() -> None:
    arguments = parse_arguments(__doc__)
    prepare_pairs()
    for seed in arguments.seeds:
        train_short(seed)
    outcomes = run_arms("figure3", ARMS, arguments.seeds, arguments.jobs, score)
    leads = [
        Outcome(LEAD, outcome.seed, read_scores(outcome.arm, outcome.seed)[LEAD]["rouge1"], [])
        for outcome in outcomes
        if outcome.arm == ARMS[0].name
    ]
    report("figure3", [*leads, *outcomes], "held-out ROUGE-1 (F1, percent)")


def prepare_pairs() -> None:
    """Make ``work/late/short`` and, with the same tokenizer, ``train`` and ``held_out``."""
    folder = WORK / "late"
    if not (folder / "held_out.jsonl").exists():
        write_pairs(fetch_dump(folder), folder, num_train=2400, num_held_out=40)
    same = "short/train/tokenizer"
    for name, tokenizer in (("short", "train:1024"), ("train", same), ("held_out", same)):
        words = ["--format", "pairs", "--tokenizer", tokenizer, "--holdout", "0"]
        haloformer(folder, "prepare", "--input", f"{name}.jsonl", *words, "--output", name)


def train_short(seed: int) -> None:
    """Train the short LED of a seed and make ``long-SEED`` of it, which reads 16,384 tokens."""
    place = WORK / "figure3"
    short, exported, long = (place / f"{name}-{seed}" for name in ("short", "exported", "long"))
    train(short, HERE / "figure3_short.yaml", seed)
    if long.exists():
        return
    for folder in (exported, place / "long.part"):
        shutil.rmtree(folder, ignore_errors=True)
    haloformer(short, "export", "latest", str(exported))
    partial = shutil.copytree(exported, place / "long.part")
    weights = load_file(partial / "model.safetensors")
    weights[POSITIONS] = repeat_positions(weights[POSITIONS], 0, LENGTH, 0)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((partial / "config.json").read_text())
    config["max_encoder_position_embeddings"] = LENGTH
    (partial / "config.json").write_text(json.dumps(config))
    partial.rename(long)


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
