"""Global rows without projecting the sequence: the projections fold into the query and the answer.

A global row g of head h scores token j by ``q_g . (W_k x_j + b_k)`` and averages
``W_v x_j + b_v``. Both are linear in x_j, so W_k can move into the query and W_v out of the sum::

    scores    q_g . (W_k x_j + b_k)         =  (W_k' q_g) . x_j + q_g . b_k
    answer    sum_j p_j (W_v x_j + b_v)     =  W_v (sum_j p_j x_j) + b_v sum_j p_j

    projected   x [n, E] -> key [n, E], value [n, E] -> H heads      4 n E E FLOPs
    folded      q [G, H, D] -> [G, H, E] . x [n, E]                  4 n G H E FLOPs

The same sums in another order, cheaper while G * H < E, and neither projection of the sequence is
kept for the backward. A folded query carries its score of b_k, and a folded answer its sum of p,
as one feature more: ``[B, G, H, E + 1]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haloformer.kernels.band import computed
from haloformer.kernels.checks import check_shape
from haloformer.kernels.global_tokens import GlobalAttention
from haloformer.kernels.merge import merge_over_ranks
from haloformer.kernels.ranks import summable


def folding_pays(num_globals: float, num_heads: int, hidden_size: int) -> bool:
    """Whether folding takes fewer FLOPs than projecting: G * H < E, whatever the length."""
    return num_globals * num_heads < hidden_size


def fold_query(query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Move the key projection into the query, with the softmax scale.

    Args:
        query: [B, G, H, D].
        weight: [H * D, E] of the key projection.
        bias: [H * D].

    Returns:
        [B, G, H, E + 1].
    """
    heads, dim = query.shape[2:]
    scaled = query * dim**-0.5
    far = torch.einsum("bghd,hde->bghe", scaled, weight.view(heads, dim, -1))
    return torch.cat([far, (scaled * bias.view(heads, dim)).sum(-1, keepdim=True)], dim=-1)


def unfold_answer(answer: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the value projection to averaged hidden states.

    Args:
        answer: [B, G, H, E + 1] from :func:`attend_folded`.
        weight: [H * D, E] of the value projection.
        bias: [H * D].

    Returns:
        [B, G, H, D].
    """
    heads = answer.shape[2]
    mean, total = answer[..., :-1], answer[..., -1:]
    out = torch.einsum("bghe,hde->bghd", mean, weight.view(heads, -1, weight.shape[-1]))
    return out + total * bias.view(heads, -1)


def attend_folded(folded_query: Tensor, hidden: Tensor, attention: GlobalAttention) -> Tensor:
    """:func:`~haloformer.kernels.global_tokens.attend_globally` for folded queries.

    Backward: the gradient of the answer is summed over the ranks, then each rank differentiates
    its own tokens. The gradient of ``folded_query`` is this rank's share only, like that of any
    weight.

    Args:
        folded_query: [B, G, H, E + 1] from :func:`fold_query`, the same on all ranks.
        hidden: [B, n, E], this rank's rows.
        attention: Who may see whom. Scores and sums are float32, or float64 for float64.

    Returns:
        [B, G, H, E + 1], the same on all ranks: sum of p x, and sum of p (1 without dropout);
        zeros for unused slots.

    Raises:
        ValueError: If the shapes disagree.
    """
    batch, _, heads, features = folded_query.shape
    shard = attention.shard
    check_shape("folded_query", folded_query, (batch, shard.num_globals, heads, features))
    check_shape("hidden", hidden, (batch, shard.num_rows, features - 1))
    answer: Tensor = _FoldedRows.apply(  # type: ignore[no-untyped-call]
        folded_query, hidden, attention
    )
    return answer


class _FoldedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, hidden: Tensor, attention: GlobalAttention) -> Tensor:
        rows = computed(hidden)
        scores = _scores(computed(query).transpose(1, 2), rows, attention)
        local_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - local_lse.masked_fill(local_lse.isinf(), 0.0)[..., None])
        factors = attention.keep_factors(weights)
        if factors is not None:
            weights.mul_(factors)
        part = torch.cat([_over_rows(weights, rows), weights.sum(-1, keepdim=True)], dim=-1)
        ranks = attention.shard.ranks
        answer, lse = merge_over_ranks(part, local_lse, ranks, attention.counter)
        ctx.attention = attention
        ctx.save_for_backward(query, hidden, answer, lse)
        return answer.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        saved_query, hidden, answer, lse = ctx.saved_tensors
        attention: GlobalAttention = ctx.attention
        summed = attention.shard.ranks.sum_(summable(grad), attention.counter)
        grad_answer = summed.transpose(1, 2)  # [B, H, G, E + 1]
        query, rows = computed(saved_query).transpose(1, 2), computed(hidden)
        weights = torch.exp(_scores(query, rows, attention) - lse[..., None])
        # d answer / d weight of token j is (x_j, 1).
        grad_weights = _with_bias(grad_answer, rows)
        factors = attention.keep_factors(weights)
        if factors is not None:
            grad_weights.mul_(factors)
        delta = (grad_answer * answer).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(delta).mul_(weights)
        dropped = weights if factors is None else weights.mul_(factors)
        grad_query = torch.cat(
            [_over_rows(grad_scores, rows), grad_scores.sum(-1, keepdim=True)], dim=-1
        )
        grad_hidden = torch.baddbmm(
            _flat(grad_scores).mT @ _flat(query[..., :-1]),
            _flat(dropped).mT,
            _flat(grad_answer[..., :-1]),
        )
        grad_query = grad_query.transpose(1, 2).to(saved_query.dtype)
        return grad_query, grad_hidden.to(hidden.dtype), None


def _flat(x: Tensor) -> Tensor:
    """[B, H, G, X] -> [B, H * G, X]: the heads share the tokens, so one product serves all."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _with_bias(query: Tensor, rows: Tensor) -> Tensor:
    """[B, H, G, E + 1] against (x_j, 1) of [B, n, E] -> [B, H, G, n]."""
    flat = _flat(query)
    product = torch.baddbmm(flat[..., -1:], flat[..., :-1], rows.mT)
    return product.view(*query.shape[:-1], rows.shape[1])


def _over_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """[B, H, G, n] of [B, n, E] -> [B, H, G, E]."""
    return (_flat(weights) @ rows).view(*weights.shape[:-1], rows.shape[-1])


def _scores(query: Tensor, rows: Tensor, attention: GlobalAttention) -> Tensor:
    """[B, H, G, n] logits, -inf where not allowed."""
    scores = _with_bias(query, rows)
    return scores.masked_fill_(~attention.allowed()[:, None], -torch.inf)
