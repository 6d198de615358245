"""From a batch of whole sequences in numpy to this rank's rows in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haloformer.data_pipeline.batch import Batch
from haloformer.data_pipeline.examples import ExampleBatch
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.kernels.sharded import SequenceShard
from haloformer.launcher.topology import Topology
from haloformer.model.targets import Targets


class RankInput(NamedTuple):
    """What one rank feeds its model for one micro-batch.

    Attributes:
        input_ids: [B, n] int64, this rank's rows.
        labels: What is predicted of this rank's rows.
        shard: The whole sequence's metadata and this rank's place in it.
    """

    input_ids: Tensor
    labels: Targets
    shard: SequenceShard


class PairInput(NamedTuple):
    """What one rank feeds an encoder-decoder for one micro-batch.

    Attributes:
        input_ids: [B, n] int64, this rank's rows of the source.
        decoder_input_ids: [B, t] int64, this rank's rows of what the decoder reads.
        labels: What is predicted of this rank's rows of the target.
        shard: The whole source's metadata and this rank's place in it.
    """

    input_ids: Tensor
    decoder_input_ids: Tensor
    labels: Targets
    shard: SequenceShard


class ExampleInput(NamedTuple):
    """What one rank feeds a model of annotated examples for one micro-batch.

    Attributes:
        input_ids: [B, n] int64, this rank's rows.
        labels: int64 as in ``ExampleBatch``, of whole sequences: the same on all context ranks.
        shard: The whole sequence's metadata and this rank's place in it.
    """

    input_ids: Tensor
    labels: Tensor
    shard: SequenceShard


class ChoiceInput(NamedTuple):
    """As ``ExampleInput``, with the places of the candidates that are chosen from.

    Attributes:
        input_ids: [B, n] int64, this rank's rows.
        candidates: [B, C] int64 places in the whole sequence, 0 in an unused slot.
        candidate_mask: [B, C] bool, False = an unused slot.
        labels: [B] int64, number of the right candidate, -100 = none.
        shard: The whole sequence's metadata and this rank's place in it.
    """

    input_ids: Tensor
    candidates: Tensor
    candidate_mask: Tensor
    labels: Tensor
    shard: SequenceShard


def micro_batches(batch: Batch, micro_batch: int, topology: Topology) -> Iterator[RankInput]:
    """Cut a data-parallel rank's sequences into micro-batches, and each to this rank's rows.

    All context ranks of a group get the same batch; context rank r keeps rows
    [r * N / P, (r + 1) * N / P) of every sequence and the metadata of all of them.
    """
    for part in batch.split(micro_batch):
        yield _rank_input(part, topology)


def pair_micro_batches(
    batch: PairBatch, micro_batch: int, topology: Topology
) -> Iterator[PairInput]:
    """As ``micro_batches``; source and target are each split over the context ranks."""
    for part in batch.split(micro_batch):
        shard = _shard(part, topology)
        rows = slice(shard.first_row, shard.first_row + shard.num_rows)
        num_rows = part.labels.shape[1] // topology.layout.context
        first = topology.context_rank * num_rows
        targets = slice(first, first + num_rows)
        yield PairInput(
            input_ids=_tensor(part.input_ids[:, rows], topology),
            decoder_input_ids=_tensor(part.decoder_input_ids[:, targets], topology),
            labels=_targets(part.labels[:, targets], topology),
            shard=shard,
        )


def example_micro_batches(
    batch: ExampleBatch, micro_batch: int, topology: Topology
) -> Iterator[ExampleInput]:
    """As ``micro_batches``; every context rank gets all labels, which name places of the whole."""
    for part in batch.split(micro_batch):
        shard = _shard(part, topology)
        rows = slice(shard.first_row, shard.first_row + shard.num_rows)
        yield ExampleInput(
            input_ids=_tensor(part.input_ids[:, rows], topology),
            labels=_tensor(part.labels, topology),
            shard=shard,
        )


def choice_micro_batches(
    batch: ExampleBatch, micro_batch: int, topology: Topology
) -> Iterator[ChoiceInput]:
    """As ``example_micro_batches``, with the candidates."""
    for part, inputs in zip(
        batch.split(micro_batch), example_micro_batches(batch, micro_batch, topology), strict=True
    ):
        used = part.candidates >= 0
        yield ChoiceInput(
            input_ids=inputs.input_ids,
            candidates=_tensor(np.where(used, part.candidates, 0), topology),
            candidate_mask=_tensor(used, topology),
            labels=inputs.labels,
            shard=inputs.shard,
        )


def _rank_input(batch: Batch, topology: Topology) -> RankInput:
    shard = _shard(batch, topology)
    rows = slice(shard.first_row, shard.first_row + shard.num_rows)
    return RankInput(
        input_ids=_tensor(batch.input_ids[:, rows], topology),
        labels=_targets(batch.labels[:, rows], topology),
        shard=shard,
    )


def _shard(batch: Batch | PairBatch | ExampleBatch, topology: Topology) -> SequenceShard:
    segments = batch.segment_ids if isinstance(batch, Batch) else None
    shard = SequenceShard(
        group=topology.context_group,
        rank=topology.context_rank,
        world_size=topology.layout.context,
        length=batch.input_ids.shape[1],
        attention_mask=_on_host(batch.attention_mask),
        segment_ids=None if segments is None else _on_host(segments),
        global_positions=_on_host(batch.global_positions),
        global_mask=_on_host(batch.global_mask),
        sample_ids=_on_host(batch.sample_ids),
    )
    return shard.to(topology.device)


def _targets(labels: NDArray[np.int64], topology: Topology) -> Targets:
    """Found on the host, so that no device is waited for."""
    return Targets.of(_on_host(labels)).to(topology.device)


def _tensor(array: NDArray[Any], topology: Topology) -> Tensor:
    return _on_host(array).to(topology.device)


def _on_host(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
