"""Positions of tokens in a sharded sequence, as RoBERTa counts them."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor

PADDING_POSITION = 1  # RoBERTa: the row of the position table that padding uses


def roberta_positions(attention_mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Row of the position table for every token: 2, 3, ... over real tokens, 1 for padding.

    ::

        mask      1 1 1 0 1 0
        position  2 3 4 1 5 1

    Args:
        attention_mask: [B, N] bool over the whole sequence, True = real token.

    Returns:
        [B, N] int64.
    """
    mask = attention_mask.long()
    return mask.cumsum(dim=1) * mask + PADDING_POSITION
