"""What differs between the models a recipe can train: one object per kind.

The trainer, the worker and the checkpoints know a task by these few methods, and no kind by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from haloformer.configs.schema import CharLmConfig, LedConfig, ModelConfig, TrainConfig
from haloformer.data_pipeline.batch import Batch
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.data_pipeline.seq2seq import PairEvalStream, PairTrainStream
from haloformer.data_pipeline.stream import (
    CausalEvalStream,
    CausalTrainStream,
    EvalStream,
    TrainStream,
)
from haloformer.launcher.example_tasks import (
    ChoicesTask,
    ClassificationTask,
    CoreferenceTask,
    QuestionsTask,
)
from haloformer.launcher.feeding import PairInput, RankInput, micro_batches, pair_micro_batches
from haloformer.launcher.plan_flops import Work, training_flops
from haloformer.launcher.plan_model import model_of
from haloformer.launcher.task_base import AnyBatch, HeldOutSource, Task
from haloformer.launcher.topology import Topology
from haloformer.model.char_lm import CharLm
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.targets import IGNORED_LABEL

__all__ = ["AnyBatch", "HeldOutSource", "Task", "task_of"]


class DocumentTask(Task):
    """A task on running text, whose loss can be told per character."""

    def micro_batches(
        self, batch: Batch, micro_batch: int, topology: Topology
    ) -> Iterator[RankInput]:
        """This rank's rows of tokens and labels."""
        return micro_batches(batch, micro_batch, topology)

    def rates(self, loss: float, characters_per_token: float) -> dict[str, float]:
        """Bits per character of the source text."""
        return {"bits_per_char": loss / math.log(2.0) / characters_per_token}


class MaskedLmTask(DocumentTask):
    """Longformer that fills in masked tokens of packed documents."""

    train_stream, held_out_stream = TrainStream, EvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """Longformer with its MLM head."""
        assert isinstance(config.model, ModelConfig)
        return LongformerForMaskedLM(config.model, vocab_size, topology.tensor_group)


class CharLmTask(DocumentTask):
    """Causal language model on documents, its global tokens unused."""

    train_stream, held_out_stream = CausalTrainStream, CausalEvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """The causal model."""
        assert isinstance(config.model, CharLmConfig)
        return CharLm(config.model, vocab_size, topology.tensor_group)

    def flops(self, config: TrainConfig, vocab_size: int, batch: Batch) -> float:
        """As every task; the global tokens are not used."""
        work = Work(batch.num_tokens, 0.0, self.num_targets(batch))
        return training_flops(model_of(config.model, vocab_size), work)


class LedTask(Task):
    """LED that writes the target of each source.

    Its losses include label smoothing where the recipe has it, so they are no likelihoods.
    """

    train_stream, held_out_stream = PairTrainStream, PairEvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """Encoder, decoder and tied head."""
        assert isinstance(config.model, LedConfig)
        model = LedForConditionalGeneration(config.model, vocab_size, topology.tensor_group)
        # Zero in a fresh LED and never trained, so that checkpoints need not have it.
        model.register_buffer("final_logits_bias", model.final_logits_bias, persistent=False)
        return model

    def micro_batches(
        self, batch: PairBatch, micro_batch: int, topology: Topology
    ) -> Iterator[PairInput]:
        """This rank's rows of source and target."""
        return pair_micro_batches(batch, micro_batch, topology)

    def flops(self, config: TrainConfig, vocab_size: int, batch: PairBatch) -> float:
        """Source and target rows, and the pairs of them that see one another."""
        source = batch.attention_mask.sum(1)
        target = (batch.labels != IGNORED_LABEL).sum(1)
        work = Work(
            source=float(source.sum()),
            num_globals=float(batch.global_mask.sum() / max(len(source), 1)),
            predicted=float(target.sum()),
            target=float(target.sum()),
            pairs=float((source * target).sum()),
            seen=float((target * (target + 1)).sum() / 2),
        )
        return training_flops(model_of(config.model, vocab_size), work)

    def counts(self, batch: PairBatch) -> dict[str, int]:
        """Texts that were longer than the recipe allows and lost their ends."""
        sources, targets = batch.was_cut.sum(0).tolist()
        return {"cut_sources": sources, "cut_targets": targets}


_TASKS: dict[str, Task] = {
    "longformer_mlm": MaskedLmTask(),
    "longformer_classifier": ClassificationTask(),
    "longformer_qa": QuestionsTask(),
    "longformer_choice": ChoicesTask(),
    "longformer_coref": CoreferenceTask(),
    "led": LedTask(),
    "char_lm": CharLmTask(),
}


def task_of(config: TrainConfig) -> Task:
    """The task of a recipe."""
    return _TASKS[config.model.kind]
