"""Global tokens when the sequence is spread over ranks: whoever owns one, all ranks help.

Every collective here is the same on all ranks whatever they own, also if that is nothing: ZeRO
follows the order of the graph, and a rank that skips a call would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haloformer.kernels.band import computed
from haloformer.kernels.dropout import AttentionDropout, keep_mask
from haloformer.kernels.merge import merge_over_ranks
from haloformer.kernels.ranks import CommCounter, summable
from haloformer.kernels.shard import SequenceShard


def gather_global_rows(
    x: Tensor, shard: SequenceShard, counter: CommCounter | None = None
) -> Tensor:
    """The rows of the global tokens, on every rank.

    ::

        rank 0: a b c | rank 1: d e f, global positions [0, 4]  ->  a e on both ranks

    Backward: the ranks' gradients are summed, and each owner adds its rows'.

    Args:
        x: [B, n, ...], this rank's rows.
        shard: Where the global tokens stand.
        counter: Counts what is sent.

    Returns:
        [B, G, ...]; unused slots are zero.
    """
    return gather_rows_of([x], shard, counter)[0]


def gather_rows_of(
    xs: Sequence[Tensor], shard: SequenceShard, counter: CommCounter | None = None
) -> tuple[Tensor, ...]:
    """:func:`gather_global_rows` of several tensors of one dtype, in one message."""
    rows: tuple[Tensor, ...] = _GatherGlobalRows.apply(  # type: ignore[no-untyped-call]
        shard, counter, *xs
    )
    return rows


class _GatherGlobalRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: SequenceShard, counter: CommCounter | None, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shard, ctx.counter, ctx.shapes = shard, counter, [x.shape for x in xs]
        rows = []
        for x in xs:
            found = x[_examples(x), shard.owned_rows]
            rows.append(found.masked_fill_(~_like(shard.owned, x), 0.0))
        # One rank's row plus zeros: exact in any dtype.
        return _sum_together(rows, shard, counter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shard: SequenceShard = ctx.shard
        totals = _sum_together([summable(grad) for grad in grads], shard, ctx.counter)
        grad_xs = []
        for grad, total, shape in zip(grads, totals, ctx.shapes, strict=True):
            owned = total.to(grad.dtype).masked_fill(~_like(shard.owned, grad), 0.0)
            grad_x = grad.new_zeros(shape)
            places = (_examples(grad_x), shard.owned_rows)
            grad_xs.append(grad_x.index_put_(places, owned, accumulate=True))
        return (None, None, *grad_xs)


def _sum_together(
    xs: Sequence[Tensor], shard: SequenceShard, counter: CommCounter | None
) -> tuple[Tensor, ...]:
    """Sum tensors over the ranks, in one message."""
    packed = shard.ranks.sum_(torch.cat([x.reshape(-1) for x in xs]), counter)
    parts = torch.split(packed, [x.numel() for x in xs])
    return tuple(part.view(x.shape) for part, x in zip(parts, xs, strict=True))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """[B, R] -> [B, R, 1, ...] with as many dimensions as ``x``."""
    return mask.view(*mask.shape, *(1,) * (x.dim() - 2))


def scatter_rows(band_rows: Tensor, global_rows: Tensor, shard: SequenceShard) -> Tensor:
    """Put the global tokens' rows in their places and zeros on padding.

    Args:
        band_rows: [B, n, H, D], every local row as the band answers it.
        global_rows: [B, G, H, D], the same on all ranks; only owned rows are used here.
        shard: Where the global tokens and the padding are.

    Returns:
        [B, n, H, D].
    """
    out: Tensor = _ScatterRows.apply(  # type: ignore[no-untyped-call]
        band_rows, global_rows, shard
    )
    return out


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, band_rows: Tensor, global_rows: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        out = band_rows.masked_fill(_like(shard.overwritten, band_rows), 0.0)
        # Slots of no row here add zeros to row 0, so that nobody has to know how many there are.
        owned = global_rows.masked_fill(~_like(shard.owned, global_rows), 0.0)
        return out.index_put_((_examples(owned), shard.owned_rows), owned, accumulate=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        shard: SequenceShard = ctx.shard
        grad_global = grad[_examples(grad), shard.owned_rows]
        grad_global = grad_global.masked_fill_(~_like(shard.owned, grad), 0.0)
        return grad.masked_fill(_like(shard.overwritten, grad), 0.0), grad_global, None


def _examples(x: Tensor) -> Tensor:
    """[B, 1]: 0, 1, 2, ..., to index a row of each example."""
    return torch.arange(x.shape[0], device=x.device)[:, None]


@dataclass(frozen=True, eq=False)
class GlobalAttention:
    """What the softmax of the global rows needs besides numbers.

    Attributes:
        shard: The sequence and this rank's part of it.
        dropout: Dropout of these softmaxes, or None.
        counter: Counts what is sent.
    """

    shard: SequenceShard
    dropout: AttentionDropout | None
    counter: CommCounter | None

    def allowed(self) -> Tensor:
        """[B, G, n] bool: which local keys each global row attends."""
        shard = self.shard
        allowed = shard.global_mask[:, :, None] & shard.local(shard.attention_mask)[:, None]
        if shard.segment_ids is not None and shard.global_segments is not None:
            own = shard.local(shard.segment_ids)
            allowed = allowed & (shard.global_segments[:, :, None] == own[:, None])
        return allowed

    def keep_factors(self, like: Tensor) -> Tensor | None:
        """[B, H, G, n]: 0 where dropped, 1 / (1 - rate) elsewhere; None without dropout."""
        if self.dropout is None:
            return None
        bases = self.dropout.bases(like.shape[1])[:, :, None, None]
        first = self.shard.first_row
        columns = torch.arange(first, first + self.shard.num_rows, device=like.device)
        rows = self.shard.global_positions[:, None, :, None]
        keep = keep_mask(bases, rows, columns, self.dropout.rate)
        return keep.to(like.dtype).mul_(1.0 / (1.0 - self.dropout.rate))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[B, H, G, n] logits over the local keys, -inf where not allowed."""
        scores = _per_head(query * query.shape[-1] ** -0.5) @ _per_head(key).mT
        return scores.masked_fill_(~self.allowed()[:, None], -torch.inf)


def _per_head(x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, H, N, D] in at least float32."""
    return computed(x).transpose(1, 2)


def attend_globally(
    query: Tensor, key: Tensor, value: Tensor, attention: GlobalAttention
) -> Tensor:
    """Answer the global rows: every rank attends over its own keys, the parts merge by LSE.

    Backward: the gradient of the rows is summed over the ranks, then each rank differentiates its
    own part. The gradient of ``query`` is this rank's share only, like that of any weight: the
    loss is a sum over ranks.

    Args:
        query: [B, G, H, D], the same on all ranks.
        key: [B, n, H, D], this rank's rows.
        value: [B, n, H, D], this rank's rows.
        attention: Who may see whom.

    Returns:
        [B, G, H, D], the same on all ranks; unused slots are zero.
    """
    out: Tensor = _GlobalRows.apply(query, key, value, attention)  # type: ignore[no-untyped-call]
    return out


class _GlobalRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: GlobalAttention
    ) -> Tensor:
        scores = attention.scores(query, key)
        local_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - local_lse.masked_fill(local_lse.isinf(), 0.0)[..., None])
        factors = attention.keep_factors(weights)
        if factors is not None:
            weights.mul_(factors)
        ranks = attention.shard.ranks
        out, lse = merge_over_ranks(weights @ _per_head(value), local_lse, ranks, attention.counter)
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, out, lse)
        return out.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        attention: GlobalAttention = ctx.attention
        grad_out = attention.shard.ranks.sum_(summable(grad), attention.counter).transpose(1, 2)
        weights = torch.exp(attention.scores(query, key) - lse[..., None])
        factors = attention.keep_factors(weights)
        dropped = weights if factors is None else weights * factors
        grad_value = dropped.mT @ grad_out
        grad_weights = grad_out @ _per_head(value).mT
        if factors is not None:
            grad_weights.mul_(factors)
        delta = (grad_out * out).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(delta).mul_(weights).mul_(query.shape[-1] ** -0.5)
        grads = (grad_scores @ _per_head(key), grad_scores.mT @ _per_head(query), grad_value)
        inputs = (query, key, value)
        return (*(g.transpose(1, 2).to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None)
