"""What every task has: how one kind of model is built, fed and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.batch import Batch
from haloformer.data_pipeline.blend import training_corpora
from haloformer.data_pipeline.example_stream import ExampleEvalStream, ExampleTrainStream
from haloformer.data_pipeline.examples import ExampleBatch
from haloformer.data_pipeline.index import ShardIndex
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.data_pipeline.prefetch import Prefetcher, TrainSource
from haloformer.data_pipeline.rank_stream import seed_of_phase
from haloformer.data_pipeline.seq2seq import PairEvalStream, PairTrainStream
from haloformer.data_pipeline.stream import EvalStream, TrainStream
from haloformer.launcher.feeding import ChoiceInput, ExampleInput, PairInput, RankInput
from haloformer.launcher.plan_flops import Work, training_flops
from haloformer.launcher.plan_model import model_of
from haloformer.launcher.topology import Topology
from haloformer.model.targets import IGNORED_LABEL

AnyBatch = Batch | PairBatch | ExampleBatch
AnyInput = RankInput | PairInput | ExampleInput | ChoiceInput


class HeldOutSource(Protocol):
    """Held-out batches, the same at every pass."""

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""

    def __iter__(self) -> Iterator[AnyBatch]:
        """One pass."""

    def close(self) -> None:
        """Let go of files; nothing is asked afterwards."""


class Task(ABC):
    """How one kind of model is built, fed and measured."""

    train_stream: type[TrainStream] | type[PairTrainStream] | type[ExampleTrainStream]
    held_out_stream: type[EvalStream] | type[PairEvalStream] | type[ExampleEvalStream]

    @abstractmethod
    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """The model with fresh weights, from torch's generator.

        Args:
            config: The recipe.
            vocab_size: Entries of the tokenizer.
            topology: Its tensor-parallel group is the model's.
            num_labels: Classes that the data has, 0 where it has none.
        """

    def open_streams(
        self, config: TrainConfig, topology: Topology, phase: int = 0
    ) -> tuple[TrainSource[AnyBatch], HeldOutSource]:
        """The training and held-out streams of this rank's data-parallel share.

        The caller closes the training stream, which may have threads.

        Args:
            config: Of the phase.
            topology: Of the ranks.
            phase: Its number; each phase reads in an order of its own.
        """
        data, layout, global_batch = config.data, topology.layout, config.batch.global_batch
        train: TrainSource[AnyBatch] = self.train_stream(
            training_corpora(data),
            data,
            seed=seed_of_phase(config.seed, phase),
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
    def micro_batches(self, batch: Any, micro_batch: int, topology: Topology) -> Iterator[AnyInput]:
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

    def flops(self, config: TrainConfig, vocab_size: int, batch: Any) -> float:
        """Of forward and backward: this data-parallel rank's part, padding left out."""
        globals_ = batch.global_mask.sum() / max(len(batch.global_mask), 1)
        work = Work(batch.num_tokens, float(globals_), self.num_targets(batch))
        return training_flops(model_of(config.model, vocab_size), work)
