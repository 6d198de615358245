"""Merge softmax attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haloformer.kernels.ranks import CommCounter, Ranks


def merge_partials(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge parts held on one device: out = sum_p exp(lse_p - lse) out_p.

    Args:
        outs: Each [..., D], softmax attention over one part of the keys.
        lses: Each [...], its log-sum-exp in at least float32; +inf or -inf where the part was
            empty.

    Returns:
        Output [..., D] in the dtype of the parts, zeros where all parts are empty, and its
        log-sum-exp [...], +inf there.
    """
    all_lses = torch.stack([_empty_as_minus_inf(x) for x in lses])
    top = _finite(all_lses.amax(0))
    weights = torch.exp(all_lses - top)
    weighted = torch.stack([w[..., None] * o for w, o in zip(weights, outs, strict=True)]).sum(0)
    out, lse = _normalise(weighted, weights.sum(0), top)
    return out.to(outs[0].dtype), lse


def merge_over_ranks(
    out: Tensor, lse: Tensor, ranks: Ranks, counter: CommCounter | None = None
) -> tuple[Tensor, Tensor]:
    """Merge the parts that the ranks of a group hold; every rank gets the same result.

    Not differentiable: the caller's backward is over its own part of the keys, from the merged
    log-sum-exp.

    Args:
        out: [..., D], this rank's part, float32 or float64.
        lse: [...], its log-sum-exp, +inf or -inf where it had no key.
        ranks: The group; shapes are the same on all of them.
        counter: Counts what is sent.
    """
    lse = _empty_as_minus_inf(lse)
    top = _finite(ranks.max_(lse.clone(memory_format=torch.contiguous_format), counter))
    weight = torch.exp(lse - top)[..., None]
    # The sum of the weights travels with the rows: one reduction instead of two.
    packed = ranks.sum_(torch.cat([weight * out, weight], dim=-1), counter)
    return _normalise(packed[..., :-1], packed[..., -1], top)


def _empty_as_minus_inf(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def _finite(top: Tensor) -> Tensor:
    """The maximum, or a finite number where all is empty, so that no inf - inf arises."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def _normalise(weighted: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    empty = total == 0
    out = weighted / total.masked_fill(empty, 1.0)[..., None]
    return out, (top + total.log()).masked_fill(empty, torch.inf)
