"""A group of ranks as the attention sees it, and the counter of what they send one another."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Direction(Enum):
    """Which way along the sequence something travels: to lower or to higher ranks."""

    LEFT = 0
    RIGHT = 1


@dataclass
class CommCounter:
    """What this rank has sent, counted where it is sent.

    Attributes:
        halo_rows: Rows sent forward per direction (a row holds all tensors of the exchange).
        halo_gradient_rows: Rows of gradients sent home per direction.
        halo_bytes: Bytes of both.
        reduced_bytes: Bytes handed to all-reduce.
    """

    halo_rows: dict[Direction, int]
    halo_gradient_rows: dict[Direction, int]
    halo_bytes: int = 0
    reduced_bytes: int = 0

    def __init__(self) -> None:
        self.halo_rows = dict.fromkeys(Direction, 0)
        self.halo_gradient_rows = dict.fromkeys(Direction, 0)


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold one sequence, and which one this is.

    Attributes:
        group: Their process group; None for one rank alone, without torch.distributed.
        rank: This rank's number within the group.
        world_size: Number of ranks in the group.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    group: ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a group of {self.world_size} ranks")
        if self.group is None and self.world_size > 1:
            raise ValueError(f"world size {self.world_size} needs a process group; it is None")

    def sum_(self, x: Tensor, counter: CommCounter | None) -> Tensor:
        """All-reduce ``x`` by sum, in place; returns it. Its shape is the same on all ranks."""
        return self._all_reduce_(x, dist.ReduceOp.SUM, counter)

    def max_(self, x: Tensor, counter: CommCounter | None) -> Tensor:
        """All-reduce ``x`` by maximum, in place; returns it. Its shape is the same on all ranks."""
        return self._all_reduce_(x, dist.ReduceOp.MAX, counter)

    def _all_reduce_(
        self, x: Tensor, op: dist.ReduceOp.RedOpType, counter: CommCounter | None
    ) -> Tensor:
        assert x.is_contiguous()
        if self.world_size == 1 or x.numel() == 0:
            return x
        if counter is not None:
            counter.reduced_bytes += x.numel() * x.element_size()
        dist.all_reduce(x, op=op, group=self.group)
        return x


def summable(x: Tensor) -> Tensor:
    """A contiguous copy in at least float32, so that a sum over ranks loses nothing."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
