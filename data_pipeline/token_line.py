"""All text of a data set as one line of slots that can be read anywhere, for streams of any length.

Documents a (3 tokens) and b (2 tokens):

    slot      0   1  2  3   4    5   6   7
    joined    <s> a  a  a </s>   b   b </s>         one segment
    isolated  <s> a  a  a </s>  <s>  b   b  </s>    segments 0 0 0 0 0 1 1 1 1

So documents follow each other as they do in training, without the cuts into sequences. A set that
is one document, such as enwik8, is that document between <s> and </s>.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.causal import NextToken
from haloformer.data_pipeline.errors import CorruptSampleError
from haloformer.data_pipeline.mlm import MaskKey
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Tokenizer


class LinePart(NamedTuple):
    """Some slots of the line.

    Attributes:
        ids: [n] int64.
        labels: [n] int64, the token after each, -100 where that is a special or the line ends.
        segments: [n] int64 number of the document; None where documents see each other.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.int64] | None


class TokenLine:
    """The line of a data set.

    Args:
        reader: The data set.
        tokenizer: Its tokenizer.
        isolate: Whether documents must not see each other.
        skip_corrupt: Whether a damaged document becomes as many </s>, which are no targets, and
            is counted; or it is an error.
    """

    def __init__(
        self, reader: ShardReader, tokenizer: Tokenizer, *, isolate: bool, skip_corrupt: bool
    ) -> None:
        self._reader, self._specials = reader, tokenizer.specials
        self._label = NextToken(tokenizer.vocab_size, tokenizer.specials)
        self._isolate, self._skip_corrupt = isolate, skip_corrupt
        self._damaged: set[tuple[int, int]] = set()
        shards = reader.index.shards
        self._around = 2 if isolate else 1  # specials per document
        slots = [shard.num_tokens + self._around * shard.num_samples for shard in shards]
        self._shard_slots = np.cumsum([0 if isolate else 1, *slots], dtype=np.int64)
        self._first_document = np.cumsum([0, *(shard.num_samples for shard in shards)])
        self._opened: tuple[int, NDArray[np.int64]] | None = None

    @property
    def num_slots(self) -> int:
        """Slots of the whole line."""
        return int(self._shard_slots[-1])

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """Shard and number of the damaged documents passed over."""
        return sorted(self._damaged)

    def read(self, first: int, stop: int) -> LinePart:
        """Slots first .. stop-1.

        Raises:
            CorruptSampleError: If a document is damaged, and such are not skipped.
        """
        assert 0 <= first < stop <= self.num_slots, (first, stop)
        last = min(stop + 1, self.num_slots)  # the label of the last slot stands behind it
        ids = np.full(last - first, self._specials.eos, np.int64)
        segments = np.zeros(last - first, np.int64) if self._isolate else None
        if first == 0:
            ids[0] = self._specials.bos
        shard = max(int(np.searchsorted(self._shard_slots, first, side="right")) - 1, 0)
        while shard < len(self._shard_slots) - 1 and self._shard_slots[shard] < last:
            self._fill(ids, segments, first, shard)
            shard += 1
        labels = self._label(ids, MaskKey.of_evaluation(0))[1]
        count = stop - first
        part = None if segments is None else segments[:count]
        return LinePart(ids[:count], labels[:count], part)

    def _fill(
        self, ids: NDArray[np.int64], segments: NDArray[np.int64] | None, first: int, shard: int
    ) -> None:
        """Put what a shard has of the slots ``first`` and on into place."""
        starts, stop = self._starts(shard), first + len(ids)
        sample = max(int(np.searchsorted(starts, first, side="right")) - 1, 0)
        while sample < len(starts) - 1 and starts[sample] < stop:
            begin, end = int(starts[sample]), int(starts[sample + 1])
            if self._isolate:
                if begin >= first:
                    ids[begin - first] = self._specials.bos
                assert segments is not None
                document = int(self._first_document[shard]) + sample
                segments[max(begin - first, 0) : end - first] = document
            text = begin + self._around - 1  # slot of its first token
            low, high = max(text, first), min(end - 1, stop)
            if low < high:
                self._copy(ids[low - first : high - first], shard, sample, low - text)
            sample += 1

    def _copy(self, place: NDArray[np.int64], shard: int, sample: int, start: int) -> None:
        try:
            place[:] = self._reader.read(shard, sample, start, start + len(place))
        except CorruptSampleError:
            if not self._skip_corrupt:
                raise
            self._damaged.add((shard, sample))

    def _starts(self, shard: int) -> NDArray[np.int64]:
        """Slot of each document of a shard, and the slot behind them: [num_samples + 1]."""
        if self._opened is None or self._opened[0] != shard:
            lengths = self._reader.lengths(shard).astype(np.int64) + self._around
            starts = np.concatenate([[0], np.cumsum(lengths)]) + self._shard_slots[shard]
            self._opened = (shard, starts)
        return self._opened[1]
