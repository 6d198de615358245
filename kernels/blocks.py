"""One block of the blocked attention: views of the inputs, its scores, its masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from haloformer.kernels.band import Band
from haloformer.kernels.dropout import keep_mask
from haloformer.kernels.strands import Strand, strands


@dataclass(frozen=True)
class Edges:
    """The two masks a block can need at the ends of its window, for R rows.

    ::

        R=3, left=right=2     keys of the block      lower      upper
                              0 1 2 3 4 5 6          0 1 2      5 6
                 row 0        1 1 1 1 1 . .          0 0 0      x x
                 row 1        . 1 1 1 1 1 .          x 0 0      0 x
                 row 2        . . 1 1 1 1 1          x x 0      0 0       x = -inf

    Attributes:
        lower: [R, R], -inf where column < row.
        upper: [R, R], -inf where column >= row.
    """

    lower: Tensor
    upper: Tensor

    @classmethod
    def like(cls, x: Tensor, rows: int) -> Edges:
        """Edges for blocks of up to ``rows`` rows, in dtype and device of ``x``."""
        full = x.new_full((rows, rows), -torch.inf)
        return cls(full.tril(-1), full.triu())


@dataclass(frozen=True)
class Block:
    """Some rows of one strand of one example, and the keys they may attend.

    Attributes:
        band: The band it is cut from.
        strand: Its heads, and its class of rows.
        example: Index in the batch.
        rows: Rows, counted in the strand.
        keys: Keys, counted in the strand.
        edges: Shared masks.
        bases: [B, H] dropout hash bases, or None without dropout.
    """

    band: Band
    strand: Strand
    example: int
    rows: range
    keys: range
    edges: Edges
    bases: Tensor | None

    def take_rows(self, x: Tensor) -> Tensor:
        """The block's rows of [B, n, H, X], a view [h, R, X]."""
        return self._take(x, self.strand.query_rows[self.rows.start : self.rows.stop])

    def take_keys(self, x: Tensor) -> Tensor:
        """The block's keys of [B, m, H, X], a view [h, K, X]."""
        return self._take(x, self.strand.key_rows[self.keys.start : self.keys.stop])

    def take_globals(self, x: Tensor) -> Tensor:
        """The global rows of [B, G, H, X] for the block's heads, a view [h, G, X]."""
        return self._take(x, range(x.shape[1]))

    def _take(self, x: Tensor, rows: range) -> Tensor:
        picked = x[self.example, rows.start : rows.stop : rows.step, self.strand.heads]
        return picked.transpose(0, 1)

    def scores_(self, out: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Write base-2 logits of the band, -inf where masked, into ``out``; returns it.

        Args:
            out: [h, R, K], where to write; its content does not matter. Contiguous, or torch
                computes head by head.
            query: [h, R, D].
            key: [h, K, D].
        """
        torch.baddbmm(out, query, key.mT, beta=0, alpha=_scale(query), out=out)
        self._mask_edges_(out)
        self._mask_keys_(out)
        return out

    def global_scores_(self, out: Tensor, query: Tensor, global_key: Tensor) -> Tensor:
        """:meth:`scores_` of the global columns: ``out`` [h, R, G], ``global_key`` [h, G, D]."""
        torch.baddbmm(out, query, global_key.mT, beta=0, alpha=_scale(query), out=out)
        self._mask_globals_(out)
        return out

    def _mask_edges_(self, scores: Tensor) -> None:
        num_rows, first, end = len(self.rows), self.keys.start, self.keys.stop
        window_start = self.rows.start + self.strand.offset - self.strand.left
        num_left = min(window_start + num_rows - 1, end) - first
        if num_left > 0:
            skip = first - window_start  # columns cut off by the start of the sequence
            scores[:, :, :num_left] += self.edges.lower[:num_rows, skip : skip + num_left]
        window_stop = self.rows.start + self.strand.offset + self.strand.right + 1
        right = max(first, window_stop)
        if right < end:
            mask = self.edges.upper[:num_rows, right - window_stop : end - window_stop]
            scores[:, :, right - first :] += mask

    def _mask_keys_(self, scores: Tensor) -> None:
        keys = self.strand.key_rows[self.keys.start : self.keys.stop]
        taken = slice(keys.start, keys.stop, keys.step)
        if self.band.key_mask is not None:
            allowed = self.band.key_mask[self.example, taken]
            if not allowed.all():
                scores.masked_fill_(~allowed, -torch.inf)
        if self.band.key_segments is not None:
            self._mask_segments_(scores, self.band.key_segments[self.example, taken])

    def _mask_globals_(self, scores: Tensor) -> None:
        if self.band.global_mask is not None:
            scores.masked_fill_(~self.band.global_mask[self.example], -torch.inf)
        if self.band.global_segments is not None:
            self._mask_segments_(scores, self.band.global_segments[self.example])

    def _mask_segments_(self, scores: Tensor, segments: Tensor) -> None:
        assert self.band.query_segments is not None
        rows = self.strand.query_rows[self.rows.start : self.rows.stop]
        own = self.band.query_segments[self.example, rows.start : rows.stop : rows.step]
        scores.masked_fill_(own[:, None] != segments, -torch.inf)

    def keep_factors(self, like: Tensor) -> Tensor:
        """[h, R, G + K]: 0 where dropped, 1 / (1 - rate) elsewhere, in the dtype of ``like``."""
        dropout = self.band.dropout
        assert dropout is not None and self.bases is not None
        rows = self.strand.query_rows[self.rows.start : self.rows.stop]
        keys = self.strand.key_rows[self.keys.start : self.keys.stop]
        row_positions = torch.arange(rows.start, rows.stop, rows.step, device=like.device)
        columns = torch.arange(keys.start, keys.stop, keys.step, device=like.device)
        columns += dropout.first_row - self.band.offset
        if dropout.global_columns is not None:
            columns = torch.cat([dropout.global_columns[self.example], columns])
        bases = self.bases[self.example, self.strand.heads]
        keep = keep_mask(
            bases[:, None, None],
            (row_positions + dropout.first_row)[:, None],
            columns,
            dropout.rate,
        )
        return keep.to(like.dtype).mul_(1.0 / (1.0 - dropout.rate))


def _scale(query: Tensor) -> float:
    """Of base-2 logits."""
    return math.log2(math.e) / math.sqrt(query.shape[-1])


def blocks(query: Tensor, key: Tensor, band: Band, size: int) -> Iterator[Block]:
    """Every block of the band, ``size`` rows each: together they hold every row exactly once.

    Args:
        query: [B, n, H, D].
        key: [B, m, H, D].
        band: Who may see whom.
        size: Most rows in a block.
    """
    num_batch, n, num_heads, _ = query.shape
    edges = Edges.like(query, min(size, n))
    bases = band.dropout.bases(num_heads) if band.dropout is not None else None
    cut = strands(band.spec, n, key.shape[1], band.offset, band.valid)
    for example in range(num_batch):
        for strand in cut:
            for rows, keys in strand.blocks(size):
                yield Block(band, strand, example, rows, keys, edges, bases)
