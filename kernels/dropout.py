"""Stateless dropout: the mask is a pure function of where an element stands in the whole run.

A counter-based integer hash of (seed, step, layer, site, sample, head, global row, global column)
decides each element. So a run drops the same elements for every layout of ranks, recomputed
activations replay their mask for free, and no generator state has to be checkpointed. The Triton
kernel computes the same bits: all arithmetic here is 32-bit with wrap-around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_CACHED_ELEMENTS = 1 << 16
# lowbias32, a public-domain 32-bit finaliser (Chris Wellons, "Prospecting for hash functions").
MIX_A = 0x7FEB352D
MIX_B = 0x846CA68B
ROW_STEP = 0x9E3779B9  # odd, so row -> row * ROW_STEP is a bijection modulo 2**32
COLUMN_STEP = 0x85EBCA6B


def signed32(x: int) -> int:
    """The int32 value with the bits of the low 32 bits of ``x``."""
    x &= _MASK32
    return x - (1 << 32) if x >= (1 << 31) else x


def _mix_int(x: int) -> int:
    x &= _MASK32
    x = ((x ^ (x >> 16)) * MIX_A) & _MASK32
    x = ((x ^ (x >> 15)) * MIX_B) & _MASK32
    return x ^ (x >> 16)


def mix32_(x: Tensor) -> Tensor:
    """lowbias32 of every element of an int32 tensor, in place (shifts are made logical)."""
    x ^= (x >> 16) & 0xFFFF
    x *= signed32(MIX_A)
    x ^= (x >> 15) & 0x1FFFF
    x *= signed32(MIX_B)
    x ^= (x >> 16) & 0xFFFF
    return x


def fold_key(seed: int, step: int, layer: int, site: int) -> int:
    """Fold what names a dropout site in a run into one unsigned 32-bit key.

    Args:
        seed: Seed of the run, non-negative.
        step: Optimizer step.
        layer: Index of the layer.
        site: Which dropout of the layer.

    Returns:
        The key, in [0, 2**32).

    Raises:
        ValueError: If a number is negative.
    """
    key = 0x243F6A88
    for name, part in (("seed", seed), ("step", step), ("layer", layer), ("site", site)):
        if part < 0:
            raise ValueError(f"{name} is {part}; dropout keys are made of non-negative numbers")
        key = _mix_int(key + ROW_STEP ^ (part & _MASK32))
        key = _mix_int(key + COLUMN_STEP ^ (part >> 32))
    return key


def drop_threshold(rate: float) -> int:
    """31-bit threshold: an element whose low 31 hash bits lie below it is dropped."""
    return min(round(rate * (1 << 31)), (1 << 31) - 1)


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of one softmax, as a function of position.

    Attributes:
        rate: Probability of dropping, in [0, 1).
        key: Unsigned 32-bit key of the site, from :func:`fold_key`.
        sample_ids: [B] int64, the place of each example in the global batch.
        first_row: Position in the whole sequence of row 0 of the query.
        global_columns: [B, G] int64, positions in the whole sequence of the global keys; needed
            when there are global keys.
        heads: Numbers, in the whole layer, of the heads at hand; None = 0, 1, 2, ... Needed where
            only some heads are computed at once (a halo exchange per reach, tensor parallelism).

    Raises:
        ValueError: If the rate is outside [0, 1).
    """

    rate: float
    key: int
    sample_ids: Tensor
    first_row: int = 0
    global_columns: Tensor | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout rate {self.rate} is outside [0, 1)")

    def bases(self, num_heads: int) -> Tensor:
        """[B, H] int32: the hash base of every (sample, head), shared by torch and Triton."""
        heads = range(num_heads) if self.heads is None else self.heads
        assert len(heads) == num_heads, (heads, num_heads)
        return hash_bases(self.key, self.sample_ids, heads)


def hash_bases(key: int, sample_ids: Tensor, heads: Sequence[int]) -> Tensor:
    """[B, H] int32: the hash base of every (sample, head) at a site."""
    low = (sample_ids & 0x7FFFFFFF).to(torch.int32)
    high = (sample_ids >> 31).to(torch.int32)
    base = mix32_((low * signed32(ROW_STEP)) ^ signed32(key))
    base = mix32_(base ^ (high * signed32(COLUMN_STEP)))
    numbers = torch.tensor(heads, dtype=torch.int32, device=sample_ids.device)
    return mix32_(base[:, None] + numbers * signed32(ROW_STEP))


def keep_mask(bases: Tensor, rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Which elements stay.

    Row hash r = mix(base + row * ROW_STEP), element hash mix(r + column * COLUMN_STEP); an element
    stays when the low 31 bits reach :func:`drop_threshold`.

    Args:
        bases: int32, broadcastable to the result, from :func:`hash_bases`.
        rows: Integer positions of the rows, broadcastable to the result.
        columns: Integer positions of the columns, broadcastable to the result.
        rate: Probability of dropping.

    Returns:
        bool mask of the broadcast shape, True = stays.
    """
    row_hash = mix32_(bases + rows.to(torch.int32) * signed32(ROW_STEP))
    terms = columns.to(torch.int32) * signed32(COLUMN_STEP)
    threshold = drop_threshold(rate)
    one_row_of_columns = terms.numel() == terms.shape[-1] if terms.dim() else True
    rows_apart = row_hash.dim() > 1 and row_hash.shape[-1] == 1
    if row_hash.device.type != "cpu" or not (rows_apart and one_row_of_columns):
        return _low_bits(row_hash + terms) >= threshold
    # A dozen passes over a few rows that stay in the cache are a third of those over all at once.
    keep = torch.empty(*row_hash.shape[:-1], terms.numel(), dtype=torch.bool)
    few = max(1, _CACHED_ELEMENTS // max(1, terms.numel()))
    parts = torch.split(keep.flatten(0, -2), few)
    for part, hashes in zip(parts, torch.split(row_hash.flatten(0, -2), few), strict=True):
        torch.ge(_low_bits(hashes + terms.flatten()), threshold, out=part)
    return keep


def _low_bits(x: Tensor) -> Tensor:
    mixed = mix32_(x)
    mixed &= 0x7FFFFFFF
    return mixed
