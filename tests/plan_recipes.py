"""Small recipes for the planner's tests, and what it says of them."""

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.plan_model import model_of, rows_of, split_of

VOCAB = 101


def recipe(
    kind="mlm", *, context=1, tensor=1, zero=1, precision="fp32", recompute="none", batch=1,
    micro=1, seq=256, size=16, **model,
):  # fmt: skip
    """A recipe as a mapping; ``model`` replaces keys of its model section."""
    data = {"train": "-", "eval": "-", "seq_len": seq}
    if kind == "led":
        data["target_len"] = 32
        section = {"kind": "led", "max_source_positions": seq, "max_target_positions": 32}
        for half in ("encoder", "decoder"):
            section |= {f"{half}_layers": 2, f"{half}_heads": 2, f"{half}_ffn_size": 4 * size}
    else:
        section = {"kind": {"mlm": "longformer_mlm", "char": "char_lm"}[kind], "num_layers": 2}
        section |= {"num_heads": 4, "ffn_size": 4 * size, "max_positions": seq}
        if kind == "char":
            section["dilation"] = [1, 3]
    section |= {"hidden_size": size, "attention_window": 32, "recompute": recompute}
    return {
        "name": "small",
        "steps": 4,
        "model": section | model,
        "data": data,
        "batch": {"global_batch": batch, "micro_batch": micro},
        "optim": {"learning_rate": 1e-4},
        "parallel": {
            "context": context, "tensor": tensor, "zero_stage": zero, "precision": precision,
        },
        "checkpoint": {"every": 4},
    }  # fmt: skip


def numbers(raw, world, num_globals=1):
    """Model, rows, split and accumulation of a recipe on so many ranks."""
    config = TrainConfig.model_validate(raw)
    split = split_of(config, world)
    accumulation = config.batch.global_batch // (split.data * split.micro_batch)
    return model_of(config.model, VOCAB), rows_of(config, split, num_globals), split, accumulation
