"""Merge softmax attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from haloformer.kernels.ranks import CommCounter, Ranks


def merge_over_ranks(
    out: Tensor, lse: Tensor, ranks: Ranks, counter: CommCounter | None = None
) -> tuple[Tensor, Tensor]:
    """Merge the parts that the ranks of a group hold: out = sum_p exp(lse_p - lse) out_p.

    Not differentiable: the caller's backward is over its own part of the keys, from the merged
    log-sum-exp.

    Args:
        out: [..., D], this rank's part, float32 or float64.
        lse: [...], its log-sum-exp, +inf or -inf where it had no key.
        ranks: The group; shapes are the same on all of them.
        counter: Counts what is sent.

    Returns:
        Output [..., D], zeros where all parts are empty, and its log-sum-exp [...], +inf there; the
        same on all ranks.
    """
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    top = ranks.max_(lse.clone(memory_format=torch.contiguous_format), counter)
    # Finite where all parts are empty too, so that no inf - inf arises.
    top = top.clamp(min=torch.finfo(top.dtype).min)
    weight = torch.exp(lse - top)[..., None]
    # The sum of the weights travels with the rows: one reduction instead of two.
    packed = ranks.sum_(torch.cat([weight * out, weight], dim=-1), counter)
    total = packed[..., -1]
    empty = total == 0
    merged = packed[..., :-1] / total.masked_fill(empty, 1.0)[..., None]
    return merged, (top + total.log()).masked_fill(empty, torch.inf)
