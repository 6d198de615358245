"""Streams of samples that fill a row each: exact, resumable by two integers, alike on any ranks.

The epochs' samples, each epoch permuted by (seed, epoch), form one endless line. Sample number k of
the line feeds slot k % global_batch; data-parallel rank r of R makes the slots with i % R == r:

    5 samples, global batch 4:   epoch 0: c a e b d     epoch 1: b d a c e
                                 step 0:  c a e b       step 1:  d b d a      step 2: ...
    slot                                  0 1 2 3                0 1 2 3

No sample is left out and none is read twice in an epoch, whatever the batch. Several corpora have a
line each: a slot takes the next sample of the line that feeds it (see ``blend``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import ShardIndex
from haloformer.data_pipeline.order import EpochOrder
from haloformer.data_pipeline.rank_stream import HeldOutStream, RankStream
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.samples import SampleKey
from haloformer.data_pipeline.tokenizers import Tokenizer

_MAX_EPOCHS = 8  # orders kept in memory; a batch lies in one or two epochs, a huge one in more

Row = TypeVar("Row")
B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Maker(Protocol[Row, B_co]):
    """Makes rows and batches of one kind of sample."""

    def make(self, key: SampleKey, seq_len: int) -> Row:
        """Read one sample; raises ``CorruptSampleError`` where it is not what was written."""

    def padding(self) -> Row:
        """A row for a place that has no sample."""

    def stack(self, rows: Sequence[Row], sample_ids: Sequence[int]) -> B_co:
        """Stack rows, padded to the longest of them."""


class Samples(Generic[Row, B]):
    """One corpus as one thread reads it: its files, and the orders of its epochs."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Tokenizer,
        maker: Maker[Row, B],
        config: DataConfig,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.index: ShardIndex = reader.index
        self.reader, self.tokenizer, self.maker, self.config = reader, tokenizer, maker, config
        self.num_skipped = 0
        self._seed, self._shuffle = seed, shuffle
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()

    def row(self, epoch: int, position: int) -> Row:
        """The sample at a position of an epoch; a damaged one is padding where that is allowed."""
        shards, samples = self._order(epoch).documents(position, 1)
        key = SampleKey(epoch, int(shards[0]), int(samples[0]))
        try:
            return self.maker.make(key, self.config.seq_len)
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
    """Where the run stands in the line of one corpus: its next sample."""

    epoch: int
    position: int

    def after(self, num_samples: int) -> _Line:
        """Behind that sample, in epochs of ``num_samples``."""
        last = self.position + 1 == num_samples
        return _Line(self.epoch + 1, 0) if last else _Line(self.epoch, self.position + 1)


class SampleTrainStream(RankStream[Samples[Row, B]], Generic[Row, B]):
    """This rank's part of every global batch, for ever: see ``RankStream``.

    A damaged sample that is skipped becomes padding.
    """

    @abstractmethod
    def _maker(self, reader: ShardReader, tokenizer: Tokenizer) -> Maker[Row, B]:
        """What makes the rows of a corpus."""

    def _open(self, index: ShardIndex, slots: Sequence[int]) -> Samples[Row, B]:
        reader, tokenizer = ShardReader(index, self._config.on_corrupt), index.load_tokenizer()
        maker = self._maker(reader, tokenizer)
        return Samples(reader, tokenizer, maker, self._config, seed=self._seed, shuffle=True)

    @cached_property
    def _lines(self) -> list[_Line]:
        """The state: of a fresh run, the first samples."""
        return [_Line(0, 0)] * len(self._first)

    @property
    def _num_samples(self) -> list[int]:
        return [samples.index.num_samples for samples in self._first]

    def next_batch(self) -> B:
        """This rank's samples of the next optimizer step, slots ascending.

        Raises:
            CorruptSampleError: If a sample is damaged and ``on_corrupt`` is ``stop``.
        """
        step = self._step(self._lines)
        lines, sizes, places = list(self._lines), self._num_samples, []
        for slot in range(self._global_batch):
            corpus = self._blend.corpus(step, slot)
            places.append((corpus, lines[corpus]))
            lines[corpus] = lines[corpus].after(sizes[corpus])

        def row(slot: int) -> Row:
            corpus, line = places[slot]
            return self._opened[slot][corpus].row(*line)

        rows = self._workers.map(row)
        self._lines = lines
        return self._first[0].maker.stack(rows, self._slots)

    def _step(self, lines: Sequence[_Line]) -> int:
        """Steps made: a global batch of samples each."""
        counted = zip(lines, self._num_samples, strict=True)
        return sum(line.epoch * num + line.position for line, num in counted) // self._global_batch

    def state_dict(self) -> dict[str, list[int]]:
        """Epoch and position of the next sample of each corpus, the same on every rank."""
        return {self.content: [part for line in self._lines for part in line]}

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from a state, at any number of ranks.

        Raises:
            DataError: If it is not one of this data; nothing is changed then.
        """
        parts = list(state[self.content]) if set(state) == {self.content} else []
        whole = len(parts) == 2 * len(self._lines)
        whole = whole and all(type(part) is int and part >= 0 for part in parts)
        lines = [_Line(*parts[at : at + 2]) for at in range(0, len(parts), 2)] if whole else []
        sizes = self._num_samples
        if not whole or any(line.position >= n for line, n in zip(lines, sizes, strict=True)):
            raise DataError(
                f"the state {dict(state)} is no epoch and position below "
                f"{' and '.join(map(str, sizes))}",
                file=self._facts.place,
                remedy="resume with the data of the run",
            )
        self._lines = lines


class SampleEvalStream(HeldOutStream[Samples[Row, B]], Generic[Row, B]):
    """Held-out samples in stored order, each once: see ``HeldOutStream``."""

    @abstractmethod
    def _maker(self, reader: ShardReader, tokenizer: Tokenizer) -> Maker[Row, B]:
        """What makes the rows of the data set."""

    def _open(self, index: ShardIndex) -> Samples[Row, B]:
        reader, tokenizer = ShardReader(index, self._config.on_corrupt), index.load_tokenizer()
        maker = self._maker(reader, tokenizer)
        return Samples(reader, tokenizer, maker, self._config, seed=0, shuffle=False)

    def __iter__(self) -> Iterator[B]:
        """One pass."""
        samples, num_samples = self._corpus, self.index.num_samples
        num_batches = -(-num_samples // self._global_batch)
        if self._num_batches is not None:
            num_batches = min(num_batches, self._num_batches)
        for number in range(num_batches):
            places = [number * self._global_batch + slot for slot in self._slots]
            rows = [
                samples.row(0, at) if at < num_samples else samples.maker.padding() for at in places
            ]
            yield samples.maker.stack(rows, self._slots)
