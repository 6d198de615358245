"""Pairs of source and target as NumPy arrays, padded no wider than they have to be.

Source and target keep their beginnings; what is longer than the recipe allows is cut and counted.

    seq_len 6, target_len 5, padded to a multiple of 2:
    source a b c d e f g   ->   <s> a b c d </s>                     cut
    target x y             ->   <s> x y </s>                         4 rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.mlm import IGNORED
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.samples import SampleKey, padded
from haloformer.data_pipeline.tokenizers import Specials

PairKey = SampleKey


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair before it is stacked; ``key`` is None on a row that only fills a place."""

    source: NDArray[np.int64]  # [n], <s> and </s> included
    target: NDArray[np.int64]  # [m]
    was_cut: tuple[bool, bool]  # source, target
    key: PairKey | None


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs, b of them; N source and T target tokens, multiples of ``pad_multiple``."""

    input_ids: NDArray[np.int64]  # [b, N]
    decoder_input_ids: NDArray[np.int64]  # [b, T], the labels shifted right, </s> in front
    labels: NDArray[np.int64]  # [b, T], -100 on padding
    attention_mask: NDArray[np.bool_]  # [b, N], False on padding
    global_positions: NDArray[np.int64]  # [b, G]
    global_mask: NDArray[np.bool_]  # [b, G], False on rows without text
    sample_ids: NDArray[np.int64]  # [b], slot in the global batch
    was_cut: NDArray[np.bool_]  # [b, 2]: source, target
    keys: tuple[PairKey | None, ...]
    pad_multiple: int

    @property
    def num_tokens(self) -> int:
        """Tokens of sources and targets, padding left out."""
        return int(self.attention_mask.sum()) + int((self.labels != IGNORED).sum())

    def split(self, micro_batch: int) -> Iterator[PairBatch]:
        """Cut into micro batches of ``micro_batch`` pairs, each as narrow as its longest pair.

        Padding costs as much as text, and the lengths of documents differ by a factor of ten.
        """
        for start in range(0, len(self.sample_ids), micro_batch):
            part = slice(start, start + micro_batch)
            mask, labels = self.attention_mask[part], self.labels[part]
            width = padded(int(mask.sum(1).max()), self.pad_multiple)
            num_labels = padded(int((labels != IGNORED).sum(1).max()), self.pad_multiple)
            yield PairBatch(
                self.input_ids[part, :width],
                self.decoder_input_ids[part, :num_labels],
                labels[:, :num_labels],
                mask[:, :width],
                self.global_positions[part],
                self.global_mask[part],
                self.sample_ids[part],
                self.was_cut[part],
                self.keys[part],
                self.pad_multiple,
            )


@dataclass(frozen=True, slots=True)
class PairMaker:
    """Reads pairs and lays them out.

    Attributes:
        reader: Where the tokens are.
        specials: Ids of <s>, </s> and <pad>.
        target_len: Most target tokens, <s> and </s> included.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).
        has_globals: Whether <s> of the source is global.
    """

    reader: ShardReader
    specials: Specials
    target_len: int
    pad_multiple: int
    has_globals: bool

    def make(self, key: PairKey, seq_len: int) -> PairRow:
        """Read one pair.

        Args:
            key: Which one.
            seq_len: Most source tokens, <s> and </s> included.

        Raises:
            CorruptSampleError: If its bytes are not the ones that were written.
        """
        num_source, num_tokens = self.reader.pair_lengths(key.shard, key.sample)
        source, source_cut = self._text(key, 0, num_source, seq_len)
        target, target_cut = self._text(key, num_source, num_tokens, self.target_len)
        return PairRow(source, target, (source_cut, target_cut), key)

    def _text(
        self, key: PairKey, start: int, stop: int, limit: int
    ) -> tuple[NDArray[np.int64], bool]:
        kept = min(stop - start, limit - 2)
        tokens = self.reader.read(key.shard, key.sample, start, start + kept)
        ids = np.concatenate([[self.specials.bos], tokens, [self.specials.eos]])
        return ids.astype(np.int64), kept < stop - start

    def padding(self) -> PairRow:
        """A row without text, for a place that has no pair."""
        nothing = np.empty(0, np.int64)
        return PairRow(nothing, nothing, (False, False), None)

    def stack(self, rows: Sequence[PairRow], sample_ids: Sequence[int]) -> PairBatch:
        """Stack rows, padded to the longest of them."""
        width = padded(max(len(row.source) for row in rows), self.pad_multiple)
        num_labels = padded(max(len(row.target) for row in rows), self.pad_multiple)
        ids = np.full((len(rows), width), self.specials.pad, np.int64)
        labels = np.full((len(rows), num_labels), IGNORED, np.int64)
        lengths = np.array([len(row.source) for row in rows])
        for number, row in enumerate(rows):
            ids[number, : len(row.source)] = row.source
            labels[number, : len(row.target)] = row.target
        # As BART and LED: the decoder reads </s> <s> x y to predict <s> x y </s>.
        shifted = np.roll(labels, 1, axis=1)
        shifted[:, 0] = self.specials.eos
        num_globals = int(self.has_globals)
        return PairBatch(
            input_ids=ids,
            decoder_input_ids=np.where(shifted == IGNORED, self.specials.pad, shifted),
            labels=labels,
            attention_mask=np.arange(width) < lengths[:, None],
            global_positions=np.zeros((len(rows), num_globals), np.int64),
            global_mask=np.repeat(lengths[:, None] > 0, num_globals, axis=1),
            sample_ids=np.asarray(sample_ids, np.int64),
            was_cut=np.array([row.was_cut for row in rows], np.bool_),
            keys=tuple(row.key for row in rows),
            pad_multiple=self.pad_multiple,
        )
