"""The streams of pairs: exact, resumable by two integers, the same for every number of ranks.

The epochs' pairs, each epoch permuted by (seed, epoch), form one endless line. Pair number k of the
line feeds slot k % global_batch; data-parallel rank r of R makes the slots with i % R == r:

    5 pairs, global batch 4:     epoch 0: c a e b d     epoch 1: b d a c e
                                 step 0:  c a e b       step 1:  d b d a      step 2: ...
    slot                                  0 1 2 3                0 1 2 3

No pair is left out and none is read twice in an epoch, whatever the batch. Several corpora have a
line each: a slot takes the next pair of the line that feeds it (see ``blend``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import Content, ShardIndex
from haloformer.data_pipeline.order import EpochOrder
from haloformer.data_pipeline.pairs import PairBatch, PairKey, PairMaker, PairRow
from haloformer.data_pipeline.rank_stream import HeldOutStream, RankStream
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Tokenizer

_MAX_EPOCHS = 8  # orders kept in memory; a batch lies in one or two epochs, a huge one in more


class _Pairs:
    """One corpus as one thread reads it: its files, and the orders of its epochs."""

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        *,
        pad_multiple: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        assert config.target_len is not None, "checked with the recipe"
        self.index, self.config = index, config
        self.tokenizer: Tokenizer = index.load_tokenizer()
        self.reader = ShardReader(index, config.on_corrupt)
        self.num_skipped = 0
        self.maker = PairMaker(
            self.reader,
            self.tokenizer.specials,
            target_len=config.target_len,
            pad_multiple=pad_multiple,
            has_globals=config.global_tokens == "first",
        )
        self._seed, self._shuffle = seed, shuffle
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()

    def row(self, epoch: int, position: int, seq_len: int) -> PairRow:
        """The pair at a position of an epoch; a damaged one is padding where that is allowed."""
        shards, samples = self._order(epoch).documents(position, 1)
        key = PairKey(epoch, int(shards[0]), int(samples[0]))
        try:
            return self.maker.make(key, seq_len)
        except CorruptSampleError:
            if self.config.on_corrupt == "stop":
                raise
            self.num_skipped += 1
            return self.maker.padding()

    def _order(self, epoch: int) -> EpochOrder:
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = EpochOrder(
                np.array([s.num_samples for s in self.index.shards], np.int64),
                np.array([s.num_tokens for s in self.index.shards], np.int64),
                self.reader.lengths,
                seed=self._seed,
                epoch=epoch,
                shuffle_block=self.config.shuffle_block,
                shuffle=self._shuffle,
            )
            if len(self._orders) > _MAX_EPOCHS:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return order


class _Line(NamedTuple):
    """Where the run stands in the line of one corpus: its next pair."""

    epoch: int
    position: int

    def after(self, num_pairs: int) -> _Line:
        """Behind that pair, in epochs of ``num_pairs``."""
        last = self.position + 1 == num_pairs
        return _Line(self.epoch + 1, 0) if last else _Line(self.epoch, self.position + 1)


class PairTrainStream(RankStream[_Pairs]):
    """This rank's part of every global batch of pairs, for ever: see ``RankStream``.

    The recipe's data section needs ``target_len``. A damaged pair that is skipped becomes padding.
    """

    content: ClassVar[Content] = "pairs"

    def _open(self, index: ShardIndex, slots: Sequence[int]) -> _Pairs:
        return _Pairs(
            index, self._config, pad_multiple=self._pad_multiple, seed=self._seed, shuffle=True
        )

    @cached_property
    def _lines(self) -> list[_Line]:
        """The state: of a fresh run, the first pairs."""
        return [_Line(0, 0)] * len(self._first)

    @property
    def _num_pairs(self) -> list[int]:
        return [pairs.index.num_samples for pairs in self._first]

    def next_batch(self) -> PairBatch:
        """This rank's pairs of the next optimizer step, slots ascending.

        Raises:
            CorruptSampleError: If a pair is damaged and ``on_corrupt`` is ``stop``.
        """
        step = self._step(self._lines)
        seq_len = self._config.seq_len
        lines, sizes, places = list(self._lines), self._num_pairs, []
        for slot in range(self._global_batch):
            corpus = self._blend.corpus(step, slot)
            places.append((corpus, lines[corpus]))
            lines[corpus] = lines[corpus].after(sizes[corpus])

        def row(slot: int) -> PairRow:
            corpus, line = places[slot]
            return self._opened[slot][corpus].row(*line, seq_len)

        rows = self._workers.map(row)
        self._lines = lines
        return self._first[0].maker.stack(rows, self._slots)

    def _step(self, lines: Sequence[_Line]) -> int:
        """Steps made: a global batch of pairs each."""
        counted = zip(lines, self._num_pairs, strict=True)
        return sum(line.epoch * num + line.position for line, num in counted) // self._global_batch

    def state_dict(self) -> dict[str, list[int]]:
        """Epoch and position of the next pair of each corpus, the same on every rank."""
        return {"pairs": [part for line in self._lines for part in line]}

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from a state, at any number of ranks.

        Raises:
            DataError: If it is not one of this data; nothing is changed then.
        """
        parts = list(state["pairs"]) if set(state) == {"pairs"} else []
        whole = len(parts) == 2 * len(self._lines)
        whole = whole and all(type(part) is int and part >= 0 for part in parts)
        lines = [_Line(*parts[at : at + 2]) for at in range(0, len(parts), 2)] if whole else []
        sizes = self._num_pairs
        if not whole or any(line.position >= n for line, n in zip(lines, sizes, strict=True)):
            raise DataError(
                f"the state {dict(state)} is no epoch and position below "
                f"{' and '.join(map(str, sizes))}",
                file=self._facts.place,
                remedy="resume with the data of the run",
            )
        self._lines = lines


class PairEvalStream(HeldOutStream[_Pairs]):
    """Held-out pairs in stored order, each once: see ``HeldOutStream``."""

    content: ClassVar[Content] = "pairs"

    def _open(self, index: ShardIndex) -> _Pairs:
        return _Pairs(index, self._config, pad_multiple=self._pad_multiple, seed=0, shuffle=False)

    def __iter__(self) -> Iterator[PairBatch]:
        """One pass."""
        pairs, num_pairs, seq_len = self._corpus, self.index.num_samples, self._config.seq_len
        num_batches = -(-num_pairs // self._global_batch)
        if self._num_batches is not None:
            num_batches = min(num_batches, self._num_batches)
        for number in range(num_batches):
            places = [number * self._global_batch + slot for slot in self._slots]
            rows = [
                pairs.row(0, at, seq_len) if at < num_pairs else pairs.maker.padding()
                for at in places
            ]
            yield pairs.maker.stack(rows, self._slots)

    def texts(self, key: PairKey) -> tuple[str, str]:
        """Source and target of a pair as they were written, not cut."""
        pairs = self._corpus
        num_source, num_tokens = pairs.reader.pair_lengths(key.shard, key.sample)
        parts = ((0, num_source), (num_source, num_tokens))
        source, target = (
            pairs.tokenizer.decode(pairs.reader.read(key.shard, key.sample, *part).tolist())
            for part in parts
        )
        return source, target
