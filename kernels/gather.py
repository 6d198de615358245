"""Rows of other ranks: all of a short sequence, chosen ones, or those that follow one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haloformer.kernels.halo import (
    HaloPlan,
    begin_fetch,
    begin_return,
    end_fetch,
    end_return_,
    plan_halo,
)
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


def gather_at(
    x: Tensor, positions: Tensor, ranks: Ranks, counter: CommCounter | None = None
) -> Tensor:
    """Rows by their position in the sequence, whichever rank holds them, on every rank.

    ::

        rank 0: a b | rank 1: c d, positions [3, 0, 3]   ->   d a d on both

    Backward: the ranks' gradients are summed, and each owner adds those of its rows.

    Args:
        x: [B, n, ...], this rank's rows; n is the same on all ranks.
        positions: [B, K] int64 within the whole sequence, the same on all ranks; any may repeat.
        ranks: The group, in the order of the rows.
        counter: Counts what is sent.

    Returns:
        [B, K, ...].
    """
    rows: Tensor = _GatherAt.apply(x, positions, ranks, counter)  # type: ignore[no-untyped-call]
    return rows


class _GatherAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, ranks: Ranks, counter: CommCounter | None
    ) -> Tensor:
        ctx.ranks, ctx.counter, ctx.shape = ranks, counter, x.shape
        local = positions - own_rows(ranks, x.shape[1]).start
        owned = (local >= 0) & (local < x.shape[1])
        examples = torch.arange(x.shape[0], device=x.device)[:, None]
        local = local.where(owned, 0)
        owned = owned.view(*owned.shape, *(1,) * (x.dim() - 2))
        ctx.save_for_backward(examples, local, owned)
        return ranks.sum_(x[examples, local].masked_fill(~owned, 0.0), counter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        examples, local, owned = ctx.saved_tensors
        total = ctx.ranks.sum_(summable(grad), ctx.counter).to(grad.dtype)
        grad_x = grad.new_zeros(ctx.shape)
        grad_x.index_put_((examples, local), total.masked_fill(~owned, 0.0), accumulate=True)
        return grad_x, None, None, None


def with_following_rows(
    x: Tensor, count: int, ranks: Ranks, counter: CommCounter | None = None
) -> Tensor:
    """This rank's rows and the ``count`` rows after them, zeros beyond the end.

    ::

        count 1, rank 0: a b | rank 1: c d   ->   a b c  |  c d 0

    Backward: gradients of the rows that were fetched go home and are added to the owner's.

    Args:
        x: [B, n, ...], this rank's rows; n is the same on all ranks.
        count: Rows wanted after the last local one, the same on all ranks.
        ranks: The group, in the order of the rows.
        counter: Counts what is sent.

    Returns:
        [B, n + count, ...].
    """
    rows: Tensor = _FollowingRows.apply(x, count, ranks, counter)  # type: ignore[no-untyped-call]
    return rows


class _FollowingRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: int, ranks: Ranks, counter: CommCounter | None
    ) -> Tensor:
        plan = plan_halo(ranks.rank, ranks.world_size, x.shape[1], 0, count)
        ctx.plan, ctx.ranks, ctx.counter, ctx.num_rows = plan, ranks, counter, x.shape[1]
        (halo,) = end_fetch(begin_fetch((x,), plan, ranks, counter), (x,), plan)
        return torch.cat([x, halo], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        plan: HaloPlan = ctx.plan
        own, halo = grad[:, : ctx.num_rows].contiguous(), grad[:, ctx.num_rows :].contiguous()
        end_return_(begin_return((halo,), plan, ctx.ranks, ctx.counter), (own,), plan)
        return own, None, None, None
