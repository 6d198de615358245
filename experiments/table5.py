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
PLACE = WORK / "table5"


def main() -> None:
    arguments = parse_arguments(__doc__)
    prepare_bytes()
    outcomes = []
    for seed in arguments.seeds:
        outcomes.append(Outcome("short", seed, train_short(seed), []))
        for arm in ("copied", "random"):
            folder = PLACE / f"{arm}-{seed}"
            train(folder, HERE / "long.yaml", seed, [f"init_from=../long-{arm}-{seed}"])
            curve = held_out(folder, "eval_bits_per_char")
            outcomes.append(Outcome(f"{arm}, untrained", seed, curve[0][1], []))
            outcomes.append(Outcome(f"{arm}, {curve[-1][0]} steps", seed, curve[-1][1], curve))
        print(f"seed {seed}: {[(o.arm, round(o.value, 3)) for o in outcomes[-5:]]}", flush=True)
    report("table5", outcomes, "held-out bits per character")


def train_short(seed: int) -> float:
    """Train the short model and make both long ones of it; its held-out bits per character."""
    short = PLACE / f"short-{seed}"
    train(short, HERE / "short.yaml", seed)
    names = ("exported", "roberta", "long-copied", "random.part", "long-random")
    exported, roberta, copied, partial, drawn = (PLACE / f"{name}-{seed}" for name in names)
    if not drawn.exists():
        for folder in (exported, roberta, copied, partial):
            shutil.rmtree(folder, ignore_errors=True)
        haloformer(short, "export", "latest", str(exported))
        write_roberta(exported, roberta)
        sizes = ["--max-positions", str(NUM_POSITIONS), "--attention-window", str(WINDOW)]
        haloformer(PLACE, "convert", roberta.name, copied.name, *sizes)
        shutil.copytree(copied, partial)
        draw_positions(partial / "model.safetensors", seed)
        partial.rename(drawn)
    return held_out(short, "eval_bits_per_char")[-1][1]


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
