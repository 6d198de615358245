"""Positions of tokens in a sharded sequence, as RoBERTa counts them."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor


def roberta_positions(
    attention_mask: Bool[Tensor, "b n"], padding_position: int = 1
) -> Int[Tensor, "b n"]:
    """Row of the position table for every token: 2, 3, ... over real tokens, 1 for padding.

    ::

        mask      1 1 1 0 1 0
        position  2 3 4 1 5 1

    Args:
        attention_mask: [B, N] bool over the whole sequence, True = real token.
        padding_position: Row of the table that padding uses; the first token has the next one.

    Returns:
        [B, N] int64.
    """
    mask = attention_mask.long()
    return mask.cumsum(dim=1) * mask + padding_position
