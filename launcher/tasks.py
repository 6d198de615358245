"""What differs between the models a recipe can train: one object per kind.

The trainer, the worker and the checkpoints know a task by these few methods, and no kind by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from haloformer.configs.schema import CharLmConfig, LedConfig, ModelConfig, TrainConfig
from haloformer.data_pipeline.batch import Batch
from haloformer.data_pipeline.blend import training_corpora
from haloformer.data_pipeline.index import ShardIndex
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.data_pipeline.prefetch import Prefetcher, TrainSource
from haloformer.data_pipeline.seq2seq import PairEvalStream, PairTrainStream
from haloformer.data_pipeline.stream import (
    CausalEvalStream,
    CausalTrainStream,
    EvalStream,
    TrainStream,
)
from haloformer.launcher.feeding import PairInput, RankInput, micro_batches, pair_micro_batches
from haloformer.launcher.throughput import forward_flops_per_token, training_flops_per_token
from haloformer.launcher.topology import Topology
from haloformer.model.char_lm import CharLm
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import IGNORED_LABEL, LongformerForMaskedLM

AnyBatch = Batch | PairBatch


class HeldOutSource(Protocol):
    """Held-out batches, the same at every pass."""

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""

    def __iter__(self) -> Iterator[AnyBatch]:
        """One pass."""


class Task(ABC):
    """How one kind of model is built, fed and measured."""

    train_stream: type[TrainStream] | type[PairTrainStream]
    held_out_stream: type[EvalStream] | type[PairEvalStream]

    @abstractmethod
    def build_model(self, config: TrainConfig, vocab_size: int, topology: Topology) -> nn.Module:
        """The model with fresh weights, from torch's generator."""

    def open_streams(
        self, config: TrainConfig, topology: Topology
    ) -> tuple[TrainSource[AnyBatch], HeldOutSource]:
        """The training and held-out streams of this rank's data-parallel share.

        The caller closes the training stream, which may have threads.
        """
        data, layout, global_batch = config.data, topology.layout, config.batch.global_batch
        train: TrainSource[AnyBatch] = self.train_stream(
            training_corpora(data),
            data,
            seed=config.seed,
            global_batch=global_batch,
            data_rank=topology.data_rank,
            data_world=layout.data,
            pad_multiple=layout.context,
        )
        held_out = self.held_out_stream(
            data.eval,
            data,
            global_batch=global_batch,
            data_rank=topology.data_rank,
            data_world=layout.data,
            pad_multiple=layout.context,
            num_batches=config.eval.batches,
            tokenizer_sha256=train.facts.tokenizer_sha256,
        )
        return train if data.prefetch == 0 else Prefetcher(train, data.prefetch), held_out

    @abstractmethod
    def micro_batches(
        self, batch: Any, micro_batch: int, topology: Topology
    ) -> Iterator[RankInput | PairInput]:
        """What the model is called with, micro-batch by micro-batch; dropout follows it."""

    def num_targets(self, batch: Any) -> int:
        """What the loss of a global batch is a mean over: this data-parallel rank's part of it."""
        return int((batch.labels != IGNORED_LABEL).sum())

    def counts(self, batch: Any) -> dict[str, int]:
        """What is counted over the global batch and shown with each step."""
        return {}

    def rates(self, loss: float, characters_per_token: float) -> dict[str, float]:
        """The loss, nats per target token, in other units."""
        return {}

    def flops_per_token(self, config: TrainConfig, vocab_size: int) -> float | None:
        """Forward and backward, per token read; None where tokens differ in what they cost."""
        return None


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

    def build_model(self, config: TrainConfig, vocab_size: int, topology: Topology) -> nn.Module:
        """Longformer with its MLM head."""
        assert isinstance(config.model, ModelConfig)
        return LongformerForMaskedLM(config.model, vocab_size, topology.tensor_group)

    def flops_per_token(self, config: TrainConfig, vocab_size: int) -> float | None:
        """Every matrix product, the head at masked positions only."""
        assert isinstance(config.model, ModelConfig)
        forward = forward_flops_per_token(
            config.model,
            vocab_size,
            num_globals=1.0 if config.data.global_tokens == "first" else 0.0,
            target_fraction=config.data.mask_probability,
        )
        return training_flops_per_token(forward)


class CharLmTask(DocumentTask):
    """Causal language model on documents, its global tokens unused; no FLOPs are told yet."""

    train_stream, held_out_stream = CausalTrainStream, CausalEvalStream

    def build_model(self, config: TrainConfig, vocab_size: int, topology: Topology) -> nn.Module:
        """The causal model."""
        assert isinstance(config.model, CharLmConfig)
        return CharLm(config.model, vocab_size, topology.tensor_group)


class LedTask(Task):
    """LED that writes the target of each source.

    Its losses include label smoothing where the recipe has it, so they are no likelihoods, and
    source and target tokens cost differently, so there is no cost per token.
    """

    train_stream, held_out_stream = PairTrainStream, PairEvalStream

    def build_model(self, config: TrainConfig, vocab_size: int, topology: Topology) -> nn.Module:
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

    def counts(self, batch: PairBatch) -> dict[str, int]:
        """Texts that were longer than the recipe allows and lost their ends."""
        sources, targets = batch.was_cut.sum(0).tolist()
        return {"cut_sources": sources, "cut_targets": targets}


_TASKS: dict[str, Task] = {
    "longformer_mlm": MaskedLmTask(),
    "led": LedTask(),
    "char_lm": CharLmTask(),
}


def task_of(config: TrainConfig) -> Task:
    """The task of a recipe."""
    return _TASKS[config.model.kind]
