"""What ``haloformer bench step`` trains for a few steps, on either side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["mlm", "led"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepCase:
    """One training step: batch 1, dropout 0.1 on hidden states as in the papers.

    Attributes:
        kind: ``mlm`` is a Longformer with 15 % of its tokens masked, ``led`` an LED.
        tokens: Of the sequence, or of the source.
        targets: Of the target; 0 for mlm.
        layers: Of the encoder, and as many of the decoder.
        hidden: Features.
        heads: Of every attention.
        ffn: Inner features.
        window: Two-sided.
        vocab: Entries of the embedding.
        recompute: What our side recomputes in backward; transformers keeps everything.
        precision: Of products and activations.
        position_rows: Rows of the table of positions, used over and over as Longformer's first
            weights use RoBERTa's; None gives every token its own. Ours, of mlm, only.
    """

    kind: Kind
    tokens: int
    targets: int
    layers: int
    hidden: int
    heads: int
    ffn: int
    window: int
    vocab: int
    recompute: str
    precision: Precision = "fp32"
    position_rows: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """Read and written."""
        return self.tokens + self.targets

    def recipe(self, ranks: int) -> dict[str, Any]:
        """A recipe for ``TrainConfig``; its data is never opened."""
        model: dict[str, Any] = {
            "hidden_size": self.hidden,
            "attention_window": self.window,
            "recompute": self.recompute,
        }
        data: dict[str, Any] = {"train": "-", "eval": "-", "seq_len": self.tokens}
        if self.kind == "mlm":
            model |= {"kind": "longformer_mlm", "num_layers": self.layers, "num_heads": self.heads}
            rows = self.tokens if self.position_rows is None else self.position_rows
            model |= {"ffn_size": self.ffn, "max_positions": rows}
        else:
            model |= {"kind": "led", "max_source_positions": self.tokens}
            for side in ("encoder", "decoder"):
                model |= {f"{side}_layers": self.layers, f"{side}_heads": self.heads}
                model |= {f"{side}_ffn_size": self.ffn}
            data["target_len"] = self.targets
        return {
            "name": "bench-step",
            "steps": 100,
            "model": model,
            "data": data,
            "batch": {"global_batch": 1},
            "optim": {"learning_rate": 1e-4, "schedule": "constant"},
            "parallel": {"context": ranks, "zero_stage": 1, "precision": self.precision},
            "checkpoint": {"every": 100},
        }

    def transformers_config(self) -> dict[str, Any]:
        """The same model as the arguments of a transformers configuration class."""
        if self.kind == "mlm":
            return {
                "attention_window": self.window,
                "hidden_size": self.hidden,
                "intermediate_size": self.ffn,
                "max_position_embeddings": self.tokens + 2,
                "num_attention_heads": self.heads,
                "num_hidden_layers": self.layers,
                "type_vocab_size": 1,
                "vocab_size": self.vocab,
            }
        config: dict[str, Any] = {
            "attention_window": self.window,
            "d_model": self.hidden,
            "max_encoder_position_embeddings": self.tokens,
            "vocab_size": self.vocab,
        }
        for side in ("encoder", "decoder"):
            config[f"{side}_layers"] = self.layers
            config[f"{side}_attention_heads"] = self.heads
            config[f"{side}_ffn_dim"] = self.ffn
        return config


# Longformer-base and LED-base widths at the depth that two CPU cores can train.
REAL: dict[Kind, StepCase] = {
    "mlm": StepCase("mlm", 4096, 0, 4, 768, 12, 3072, 512, 50265, "none"),
    "led": StepCase("led", 16384, 256, 2, 768, 12, 3072, 1024, 50265, "none"),
}
# Seconds, to see that it works.
TINY: dict[Kind, StepCase] = {
    "mlm": StepCase("mlm", 64, 0, 2, 32, 2, 64, 16, 97, "none"),
    "led": StepCase("led", 128, 16, 1, 32, 2, 64, 16, 97, "none"),
}
SIZES = {"real": REAL, "tiny": TINY}


def sweep(case: StepCase) -> tuple[StepCase, ...]:
    """The same model on sequences from a quarter to four times as long."""
    return tuple(replace(case, tokens=case.tokens * part // 4) for part in (1, 2, 4, 8, 16))


def is_promised(case: StepCase) -> bool:
    """Whether the promises about cost are made at this size."""
    return any(case.tokens == known[case.kind].tokens for known in SIZES.values())
