"""Table 5's order: copied positions against random ones, before training and a few steps later.

    python experiments/table5.py --seeds 1 2 3

A model of 64 positions with full attention is trained first, on enwiki6, and written as a RoBERTa
of transformers. ``haloformer convert`` makes it a Longformer of 512 positions and window 64, whose
positions are copies of the 64; beside it the same with random positions. Both then train on.

The paper's figures (base, bits per character): RoBERTa-512 1.846; Longformer-4096 with random
positions 10.299, with copied ones 1.957, after 2K updates 1.753.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from arms import HERE, WORK, Outcome, haloformer, held_out, parse_arguments, report, train
from enwiki6 import prepare_bytes
from safetensors.torch import load_file, save_file
from transformers import LongformerForMaskedLM, RobertaConfig, RobertaForMaskedLM

POSITIONS = "longformer.embeddings.position_embeddings.weight"
NUM_POSITIONS, WINDOW = 512, 64


def main() -> None:
    arguments = parse_arguments(__doc__)
    prepare_bytes()
    outcomes = []
    for seed in arguments.seeds:
        place = WORK / "table5" / f"seed-{seed}"
        short = train_short(place, seed)
        outcomes.append(Outcome("short", seed, short, []))
        for arm in ("copied", "random"):
            train(place / arm, HERE / "long.yaml", seed, [f"init_from=../long-{arm}"])
            curve = held_out(place / arm, "eval_bits_per_char")
            outcomes.append(Outcome(f"{arm}, untrained", seed, curve[0][1], []))
            outcomes.append(Outcome(f"{arm}, {curve[-1][0]} steps", seed, curve[-1][1], curve))
        print(f"seed {seed}: {[(o.arm, round(o.value, 3)) for o in outcomes[-5:]]}", flush=True)
    report("table5", outcomes, "held-out bits per character")


def train_short(place: Path, seed: int) -> float:
    """Train the short model and make both long ones of it; its held-out bits per character."""
    train(place / "short", HERE / "short.yaml", seed)
    if not (place / "long-random").exists():
        for name in ("exported", "roberta", "long-copied", "random.part"):
            shutil.rmtree(place / name, ignore_errors=True)
        haloformer(place / "short", "export", "latest", "../exported")
        write_roberta(place / "exported", place / "roberta")
        sizes = ["--max-positions", str(NUM_POSITIONS), "--attention-window", str(WINDOW)]
        haloformer(place, "convert", "roberta", "long-copied", *sizes)
        shutil.copytree(place / "long-copied", place / "random.part")
        draw_positions(place / "random.part" / "model.safetensors", seed)
        (place / "random.part").rename(place / "long-random")
    return held_out(place / "short", "eval_bits_per_char")[-1][1]


def write_roberta(longformer: Path, target: Path) -> None:
    """Write a Longformer whose window holds every sequence as the RoBERTa that it then is."""
    model = LongformerForMaskedLM.from_pretrained(longformer)
    config = model.config.to_dict()
    for key in ("model_type", "architectures", "attention_window", "sep_token_id", "onnx_export"):
        config.pop(key, None)
    roberta = RobertaForMaskedLM(RobertaConfig(**config))
    weights = {
        name.replace("longformer.", "roberta.", 1): tensor
        for name, tensor in model.state_dict().items()
        if "_global." not in name
    }
    roberta.load_state_dict(weights)
    roberta.save_pretrained(target)
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (longformer / file).exists():
            shutil.copy(longformer / file, target / file)


def draw_positions(file: Path, seed: int) -> None:
    """Replace the position table by draws from N(0, 0.02), as a new model has it."""
    weights = load_file(file)
    table = weights[POSITIONS]
    generator = torch.Generator().manual_seed(seed)
    weights[POSITIONS] = 0.02 * torch.randn(table.shape, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
