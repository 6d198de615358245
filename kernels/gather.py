"""Rows of a short sharded sequence, whole on every rank: a decoder's tokens, scores per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haloformer.kernels.ranks import CommCounter, Ranks, summable


def gather_rows(x: Tensor, ranks: Ranks, counter: CommCounter | None = None) -> Tensor:
    """All rows of a sequence that is split over the ranks, on every rank.

    ::

        rank 0: a b | rank 1: c d   ->   a b c d on both

    Backward: the ranks' gradients are summed, and each rank keeps its rows'. So what every rank
    computes alike from the result must enter the loss once, not once per rank.

    Args:
        x: [B, n, ...], this rank's rows; n is the same on all ranks.
        ranks: The group, in the order of the rows.
        counter: Counts what is sent.

    Returns:
        [B, world size * n, ...].
    """
    rows: Tensor = _GatherRows.apply(x, ranks, counter)  # type: ignore[no-untyped-call]
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, counter: CommCounter | None) -> Tensor:
        ctx.ranks, ctx.counter, ctx.num_rows = ranks, counter, x.shape[1]
        whole = x.new_zeros(x.shape[0], ranks.world_size * x.shape[1], *x.shape[2:])
        whole[:, own_rows(ranks, x.shape[1])] = x
        # One rank's row plus zeros: exact in any dtype.
        return ranks.sum_(whole, counter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = ctx.ranks.sum_(summable(grad), ctx.counter).to(grad.dtype)
        return total[:, own_rows(ctx.ranks, ctx.num_rows)].contiguous(), None, None


def own_rows(ranks: Ranks, num_rows: int) -> slice:
    """Which rows of the whole sequence this rank holds."""
    return slice(ranks.rank * num_rows, (ranks.rank + 1) * num_rows)
