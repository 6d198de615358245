"""Cross-entropy over a vocabulary that may be split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

_ELEMENTS_AT_ONCE = 1 << 20


def token_loss(
    logits: Float[Tensor, "t v"],
    targets: Int[Tensor, "t"],
    vocab_size: int,
    tensor_group: ProcessGroup | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "t"]:
    """Cross-entropy of every token, with fairseq's label smoothing.

    The target distribution has 1 - eps on the true token and eps / (V - 1) on every other
    (fairseq's label_smoothed_nll_loss; torch and older fairseq spread eps over all V)::

        V=5, eps=0.2, true token 1      0.05 0.80 0.05 0.05 0.05

    Args:
        logits: [T, V] or, under tensor parallelism, [T, V' / ranks]: this rank's part of a
            vocabulary padded to V'.
        targets: [T] int64, in [0, V).
        vocab_size: V, without padding.
        tensor_group: Tensor-parallel group; None if the vocabulary is whole.
        label_smoothing: eps.

    Returns:
        [T] nats, at least float32, the same on all tensor-parallel ranks.
    """
    losses: Tensor = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        logits, targets, vocab_size, tensor_group, label_smoothing
    )
    return losses


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        group: ProcessGroup | None,
        smoothing: float,
    ) -> Tensor:
        first = 0 if group is None else group.rank() * logits.shape[1]
        real = max(0, min(vocab_size - first, logits.shape[1]))  # columns that are no padding
        other = smoothing / (vocab_size - 1)
        scores = logits[:, :real]
        lse, scores_sum = _statistics(scores, group, with_sum=other != 0.0)
        mine = (targets >= first) & (targets < first + real)
        column = (targets - first).where(mine, 0)
        chosen = lse.new_zeros(lse.shape)
        if real:
            chosen = scores.gather(1, column[:, None])[:, 0].to(lse.dtype).where(mine, 0.0)
        # What the target distribution gives to the scores, summed over the vocabulary.
        expected = (1.0 - smoothing - other) * chosen + other * scores_sum
        ctx.group_sizes = (real, smoothing, other)
        ctx.save_for_backward(logits, lse, column, mine)
        return lse - _sum_(expected, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, column, mine = ctx.saved_tensors
        real, smoothing, other = ctx.group_sizes
        grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        grad_logits[:, real:] = 0.0
        if real:
            true = ((1.0 - smoothing - other) * mine).to(lse.dtype)
            for rows in _few_rows(logits):
                part = torch.sub(logits[rows, :real], lse[rows, None]).exp_().sub_(other)
                part.scatter_add_(1, column[rows, None], -true[rows, None])
                grad_logits[rows, :real] = part.mul_(grad[rows, None])
        return grad_logits, None, None, None, None


def _few_rows(scores: Tensor) -> Iterator[slice]:
    """All rows, a few at a time: what is made of them on the way stays in a cache."""
    step = max(1, _ELEMENTS_AT_ONCE // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], step):
        yield slice(start, start + step)


def _statistics(
    scores: Tensor, group: ProcessGroup | None, with_sum: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [T] over all ranks, and the sum [T] of this rank's scores if it is wanted."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    top = scores.new_full((scores.shape[0],), -torch.inf, dtype=dtype)
    total, summed = torch.zeros_like(top), torch.zeros_like(top)
    if scores.shape[1]:
        top = scores.amax(1).to(dtype)
    if group is not None and top.numel():
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    for rows in _few_rows(scores):
        total[rows] = torch.sub(scores[rows], top[rows, None]).exp_().sum(1)
        if with_sum:
            summed[rows] = scores[rows].sum(1, dtype=dtype)
    return top + _sum_(total, group).log(), summed


def _sum_(x: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None and x.numel():
        dist.all_reduce(x, group=group)
    return x
