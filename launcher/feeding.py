"""From a batch of whole sequences in numpy to this rank's rows in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haloformer.data_pipeline.batch import Batch
from haloformer.kernels.sharded import SequenceShard
from haloformer.launcher.topology import Topology


class RankInput(NamedTuple):
    """What one rank feeds its model for one micro-batch.

    Attributes:
        input_ids: [B, n] int64, this rank's rows.
        labels: [B, n] int64, -100 where nothing is predicted.
        shard: The whole sequence's metadata and this rank's place in it.
    """

    input_ids: Tensor
    labels: Tensor
    shard: SequenceShard


def micro_batches(batch: Batch, micro_batch: int, topology: Topology) -> Iterator[RankInput]:
    """Cut a data-parallel rank's sequences into micro-batches, and each to this rank's rows.

    All context ranks of a group get the same batch; context rank r keeps rows
    [r * N / P, (r + 1) * N / P) of every sequence and the metadata of all of them.
    """
    for part in batch.split(micro_batch):
        yield _rank_input(part, topology)


def _rank_input(batch: Batch, topology: Topology) -> RankInput:
    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(topology.device)

    length = batch.input_ids.shape[1]
    shard = SequenceShard(
        group=topology.context_group,
        rank=topology.context_rank,
        world_size=topology.layout.context,
        length=length,
        attention_mask=tensor(batch.attention_mask),
        segment_ids=None if batch.segment_ids is None else tensor(batch.segment_ids),
        global_positions=tensor(batch.global_positions),
        global_mask=tensor(batch.global_mask),
        sample_ids=tensor(batch.sample_ids),
    )
    rows = slice(shard.first_row, shard.first_row + shard.num_rows)
    return RankInput(
        input_ids=tensor(batch.input_ids[:, rows]),
        labels=tensor(batch.labels[:, rows]),
        shard=shard,
    )
