"""One optimizer step's sequences of one rank, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.causal import NextToken
from haloformer.data_pipeline.mlm import IGNORED, Masker, MaskKey
from haloformer.data_pipeline.packing import NO_SEGMENT, Layout, Span, fill
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Specials


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence before it is stacked."""

    inputs: NDArray[np.int64]  # [N]
    labels: NDArray[np.int64]  # [N]
    segments: NDArray[np.int32]  # [N], -1 on padding
    global_positions: list[int]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences, b of them, N tokens each; masks are True where there is something."""

    input_ids: NDArray[np.int64]  # [b, N]
    labels: NDArray[np.int64]  # [b, N], -100 where there is no target
    attention_mask: NDArray[np.bool_]  # [b, N], False on padding
    segment_ids: NDArray[np.int32] | None  # [b, N], -1 on padding; None: one segment each
    global_positions: NDArray[np.int64]  # [b, G]
    global_mask: NDArray[np.bool_]  # [b, G], False on entries that fill up a shorter row
    sample_ids: NDArray[np.int64]  # [b], slot in the global batch = number of the logical stream
    spans: tuple[tuple[Span, ...], ...]  # per sequence: which text it holds

    @property
    def num_tokens(self) -> int:
        """Tokens, padding left out."""
        return int(self.attention_mask.sum())

    def split(self, micro_batch: int) -> Iterator[Batch]:
        """Cut into micro batches of ``micro_batch`` sequences (the last may be shorter)."""
        for start in range(0, len(self.sample_ids), micro_batch):
            part = slice(start, start + micro_batch)
            yield Batch(
                self.input_ids[part],
                self.labels[part],
                self.attention_mask[part],
                None if self.segment_ids is None else self.segment_ids[part],
                self.global_positions[part],
                self.global_mask[part],
                self.sample_ids[part],
                self.spans[part],
            )


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Turns layouts into rows, padded to a multiple of ``pad_multiple``."""

    reader: ShardReader
    specials: Specials
    labeller: Masker | NextToken
    pad_multiple: int
    has_globals: bool

    def width(self, seq_len: int) -> int:
        """Slots of a row, padding included."""
        return -(-seq_len // self.pad_multiple) * self.pad_multiple

    def make(self, layout: Layout, key: MaskKey, seq_len: int) -> Row:
        """Read and label one sequence."""
        ids, segments = fill(layout, self.reader, self.specials, self.width(seq_len))
        inputs, labels = self.labeller(ids, key)
        spans = tuple(span for _, span in layout.spans)
        return Row(inputs, labels, segments, layout.bos if self.has_globals else [], spans)

    def padding(self, seq_len: int) -> Row:
        """A row without text, for a rank that has no sequence left while others do."""
        width = self.width(seq_len)
        return Row(
            np.full(width, self.specials.pad, np.int64),
            np.full(width, IGNORED, np.int64),
            np.full(width, NO_SEGMENT, np.int32),
            [],
            (),
        )


def stack(
    rows: Sequence[Row], sample_ids: Sequence[int], *, num_globals: int, isolate: bool
) -> Batch:
    """Stack rows.

    Args:
        rows: Sequences of one width.
        sample_ids: Their slots in the global batch.
        num_globals: Global entries at least (so that a batch of padding has the usual shape).
        isolate: Whether documents must not see each other: give segment ids.
    """
    width = max([num_globals, *(len(row.global_positions) for row in rows)])
    positions = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.bool_)
    for number, row in enumerate(rows):
        count = len(row.global_positions)
        positions[number, :count] = row.global_positions
        mask[number, :count] = True
    segments = np.stack([row.segments for row in rows])
    return Batch(
        input_ids=np.stack([row.inputs for row in rows]),
        labels=np.stack([row.labels for row in rows]),
        attention_mask=segments != NO_SEGMENT,
        segment_ids=segments if isolate else None,
        global_positions=positions,
        global_mask=mask,
        sample_ids=np.asarray(sample_ids, np.int64),
        spans=tuple(row.spans for row in rows),
    )
