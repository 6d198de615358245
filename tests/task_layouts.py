"""Every model but the masked one trained on layouts by the trainer's own parts, on shards.

``walk`` runs in the ranks of ``dist.run_ranks``. Sources have 1 to 51 tokens and targets 1 to 19,
so that some ranks hold padding only; some are cut. Texts of examples are as long.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from dist import run_ranks
from example_data import write_examples
from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.tokenizers import ByteTokenizer
from rank_steps import Rank

GLOBAL_BATCH, STEPS, NUM_PAIRS = 4, 5, 11
LED = {
    "kind": "led",
    "hidden_size": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_heads": 2,
    "decoder_heads": 4,
    "encoder_ffn_size": 24,
    "decoder_ffn_size": 20,
    "max_source_positions": 48,
    "max_target_positions": 16,
    "attention_window": [4, 20],
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "label_smoothing": 0.1,
    "initializer_range": 0.1,
}

CHAR_LM = {
    "kind": "char_lm",
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 24,
    "max_positions": 48,
    "attention_window": [4, 20],
    "dilation": [1, 3],
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "initializer_range": 0.1,
}

ENCODER = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 24,
    "max_positions": 48,
    "attention_window": [4, 20],
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "initializer_range": 0.1,
}
EXAMPLES = {
    "longformer_classifier": "classification",
    "longformer_qa": "questions",
    "longformer_choice": "choices",
    "longformer_coref": "coreference",
}
COREF = {"max_span_width": 3, "num_antecedents": 5}
MODELS = {
    "led": LED,
    "char_lm": CHAR_LM,
    **{kind: {"kind": kind, **ENCODER} for kind in EXAMPLES},
    "longformer_coref": {"kind": "longformer_coref", **ENCODER, **COREF},
}


@dataclass(frozen=True)
class Case:
    """One way to spread the same global batch of one model."""

    kind: str
    data: int
    context: int
    stage: int
    tensor: int = 1
    precision: str = "fp32"

    def __str__(self):
        mesh = f"dp{self.data}_cp{self.context}_tp{self.tensor}"
        return f"{self.kind}_{mesh}_zero{self.stage}_{self.precision}"

    @property
    def world(self):
        return self.data * self.context * self.tensor


CASES = [
    *(Case("led", d, c, stage) for d, c in [(1, 1), (2, 1), (1, 2)] for stage in (1, 3)),
    Case("led", 2, 2, 3),
    *(Case("char_lm", d, c, stage) for d, c, stage in [(1, 1, 1), (2, 1, 3), (1, 2, 1)]),
    Case("led", 1, 1, 3, tensor=2),
    Case("led", 1, 2, 1, tensor=2),
    Case("char_lm", 1, 1, 1, tensor=2),
]
EXAMPLE_CASES = [
    *(Case(kind, d, c, stage) for kind in EXAMPLES for d, c, stage in [(1, 1, 1), (2, 1, 3)]),
    *(Case(kind, 1, 2, 1) for kind in EXAMPLES),
    *(Case(kind, 1, 1, 1, tensor=2) for kind in EXAMPLES),
    Case("longformer_coref", 1, 2, 3),
    *(Case(kind, 1, 1, 1, precision="bf16") for kind in EXAMPLES),
]


def write_data(folder: Path) -> None:
    """Pairs below ``led``, documents below ``char_lm``."""
    letters = random.Random(2)
    tokenizer = ByteTokenizer()
    for kind, content in (("led", "pairs"), ("char_lm", "documents")):
        (folder / kind).mkdir()
        with DatasetWriter(folder / kind, tokenizer, 200, content) as writer:
            for n in range(NUM_PAIRS):
                lengths = (1 + 5 * n, 1 + 9 * n % 19)
                texts = tuple("".join(letters.choices("abcdefgh ", k=k)) for k in lengths)
                tokens = [tokenizer.encode(text) for text in texts]
                if kind == "led":
                    writer.add_pair(texts, *tokens, f"pair {n}")
                else:
                    writer.add(texts[0], tokens[0], f"document {n}")
            writer.close()
    for kind, content in EXAMPLES.items():
        lengths = [1 + 5 * n for n in range(NUM_PAIRS)]
        write_examples(folder / kind, content, lengths, shard_tokens=200)


def config_of(case, folder):
    place = f"{folder}/{case.kind}"
    data = {"train": place, "eval": place, "seq_len": 47}
    if case.kind == "led":
        data["target_len"] = 15
    return TrainConfig.model_validate(
        {
            "name": "layouts",
            "seed": 11,
            "steps": STEPS,
            "model": MODELS[case.kind],
            "data": data,
            "batch": {"global_batch": GLOBAL_BATCH, "micro_batch": 1},
            "optim": {"learning_rate": 1e-3, "clip_norm": 0.5},
            "parallel": {
                "context": case.context,
                "tensor": case.tensor,
                "zero_stage": case.stage,
                "precision": case.precision,
            },
            "checkpoint": {"every": 1},
            "eval": {"batches": 3},
        }
    )


def train(case, folder):
    """(loss, gradient norm) of every step, and (held-out loss, number of targets) at the end."""
    mine = Rank(config_of(case, folder), case.data)
    history = [mine.train_step(step, 1e-2 / (step + 1))[:2] for step in range(STEPS)]
    history.append(mine.evaluate())
    mine.close()
    return history


def histories(cases, folder):
    """{case name: history} of all cases, on one start of ranks for each world size."""
    write_data(folder)
    seen = {}
    for world in sorted({case.world for case in cases}):
        mine = [case for case in cases if case.world == world]
        ranks = run_ranks(world, walk, mine, str(folder), timeout=300.0)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
        seen |= ranks[0]
    return seen


def walk(rank, world, cases, folder):
    """{case name: history} of every case of this world size."""
    return {str(case): train(case, folder) for case in cases}
