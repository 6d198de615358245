"""Attention of a short sharded sequence over the keys of a long sharded one.

::

    target rows 0..3 on 2 ranks, source rows 0..5 on the same ranks

    rank 0: queries 0 1 | keys 0 1 2        1. the few queries are gathered: 0 1 2 3 everywhere
    rank 1: queries 2 3 | keys 3 4 5        2. every rank attends with all of them over its keys
                                            3. the parts merge by log-sum-exp; a rank keeps its rows

No rank holds another's source rows, and the work over the long side is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haloformer.kernels.dropout import AttentionDropout, keep_mask
from haloformer.kernels.gather import gather_rows, own_rows
from haloformer.kernels.merge import merge_over_ranks
from haloformer.kernels.ranks import CommCounter, Ranks, summable

# Scores of so many target rows exist at a time: 64 rows x 8192 keys x 16 heads are 32 MiB.
BLOCK_ROWS = 64


@dataclass(frozen=True, eq=False)
class CrossAttention:
    """What cross-attention needs besides numbers.

    Attributes:
        ranks: The ranks that share both sequences.
        key_mask: [B, n] bool, True = this rank's source row is a real token.
        dropout: Dropout of the softmax, or None; target rows count from 0.
        first_column: Position in the whole source of this rank's first row.
        counter: Counts what is sent.
    """

    ranks: Ranks
    key_mask: Tensor
    dropout: AttentionDropout | None = None
    first_column: int = 0
    counter: CommCounter | None = None


def cross_attention(query: Tensor, key: Tensor, value: Tensor, what: CrossAttention) -> Tensor:
    """Attend over every real source row of the whole sequence.

    Args:
        query: [B, t, H, D], this rank's target rows; t is the same on all ranks.
        key: [B, n, H, D], this rank's source rows.
        value: [B, n, H, D].
        what: Masks, dropout and group.

    Returns:
        [B, t, H, D]; zeros where an example has no real source row.
    """
    rows = own_rows(what.ranks, query.shape[1])
    query = gather_rows(query, what.ranks, what.counter)
    out: Tensor = _CrossRows.apply(query, key, value, what)  # type: ignore[no-untyped-call]
    return out[:, rows]


class _CrossRows(torch.autograd.Function):
    """All target rows on every rank; the gradient of the query is this rank's share of it."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, what: CrossAttention
    ) -> Tensor:
        q, k, v = (_per_head(x) for x in (query, key, value))
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
        for rows in _blocks(q.shape[2]):
            scores = _scores(q[:, :, rows], k, what)
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = _weights(scores, lse[:, :, rows])
            factors = _keep_factors(weights, rows, what)
            out[:, :, rows] = (weights if factors is None else weights * factors) @ v
        out, lse = merge_over_ranks(out, lse, what.ranks, what.counter)
        ctx.what = what
        ctx.save_for_backward(query, key, value, out, lse)
        return out.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        what: CrossAttention = ctx.what
        # Every rank has the gradient of its own rows only; each needs that of all rows.
        grad_out = what.ranks.sum_(summable(grad), what.counter).transpose(1, 2)
        q, k, v = (_per_head(x) for x in (query, key, value))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (grad_out * out).sum(-1, keepdim=True)
        scale = q.shape[-1] ** -0.5
        for rows in _blocks(q.shape[2]):
            d_o = grad_out[:, :, rows]
            weights = _weights(_scores(q[:, :, rows], k, what), lse[:, :, rows])
            factors = _keep_factors(weights, rows, what)
            grad_v += (weights if factors is None else weights * factors).mT @ d_o
            grad_weights = d_o @ v.mT
            if factors is not None:
                grad_weights.mul_(factors)
            grad_scores = grad_weights.sub_(delta[:, :, rows]).mul_(weights).mul_(scale)
            grad_q[:, :, rows] = grad_scores @ k
            grad_k += grad_scores.mT @ q[:, :, rows]
        grads = (grad_q, grad_k, grad_v)
        inputs = (query, key, value)
        return (*(g.transpose(1, 2).to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None)


def _blocks(num_rows: int) -> list[slice]:
    return [slice(s, min(s + BLOCK_ROWS, num_rows)) for s in range(0, num_rows, BLOCK_ROWS)]


def _per_head(x: Tensor) -> Tensor:
    """[B, N, H, D] -> contiguous [B, H, N, D] in at least float32."""
    return (x if x.dtype == torch.float64 else x.float()).transpose(1, 2).contiguous()


def _scores(query: Tensor, key: Tensor, what: CrossAttention) -> Tensor:
    """[B, H, R, n] logits, -inf where the source row is padding."""
    scores: Tensor = (query * query.shape[-1] ** -0.5) @ key.mT
    scores.masked_fill_(~what.key_mask[:, None, None], -torch.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); rows without a key (lse infinite) give zeros. Uses up ``scores``."""
    return scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()


def _keep_factors(like: Tensor, rows: slice, what: CrossAttention) -> Tensor | None:
    """[B, H, R, n]: 0 where dropped, 1 / (1 - rate) elsewhere; None without dropout."""
    dropout = what.dropout
    if dropout is None or dropout.rate == 0.0:
        return None
    bases = dropout.bases(like.shape[1])[:, :, None, None]
    first, device = what.first_column, like.device
    columns = torch.arange(first, first + like.shape[-1], device=device)
    positions = torch.arange(rows.start, rows.stop, device=device)[:, None]
    keep = keep_mask(bases, positions, columns, dropout.rate)
    return keep.to(like.dtype).mul_(1.0 / (1.0 - dropout.rate))
