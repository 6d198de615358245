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
from pathlib import Path
from typing import NamedTuple

import numpy as np

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.blend import (
    Blend,
    Corpora,
    Facts,
    as_corpora,
    facts_of,
    identity_of,
    open_corpora,
)
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.order import EpochOrder
from haloformer.data_pipeline.pairs import PairBatch, PairKey, PairMaker, PairRow
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.stream import slots_of_rank
from haloformer.data_pipeline.tokenizers import Tokenizer
from haloformer.data_pipeline.workers import Workers

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


class PairTrainStream:
    """This rank's part of every global batch of pairs, for ever.

    Args:
        data: A folder of pairs made by ``prepare`` (its ``train``), a path or URL; or several with
            weights.
        config: The recipe's data section, with ``target_len``.
        seed: Seed of the run: the order.
        global_batch: Pairs per optimizer step, over all ranks.
        data_rank: Data-parallel rank (ranks of one context-parallel group pass the same).
        data_world: Data-parallel ranks; must divide ``global_batch``.
        pad_multiple: Sources and targets are padded to a multiple of it (the context-parallel
            size).

    Raises:
        DataError: If a data set is damaged, holds no pairs, or was made with another tokenizer than
            the others.
        ValueError: If the ranks do not divide the batch.
    """

    def __init__(
        self,
        data: Corpora,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        data_rank: int,
        data_world: int,
        pad_multiple: int = 1,
    ) -> None:
        self._slots = slots_of_rank(global_batch, data_rank, data_world)
        self._workers = Workers(config.workers, self._slots)
        corpora = as_corpora(data)
        self._blend = Blend([corpus.weight for corpus in corpora], seed)
        self._config, self._seed, self._global_batch = config, seed, global_batch
        self._opened: dict[int, list[_Pairs]] = {}  # of each slot's worker, one per corpus
        for worker in range(self._workers.num_workers):
            indexes = open_corpora(corpora, "pairs", config.cache)
            opened = [
                _Pairs(index, config, pad_multiple=pad_multiple, seed=seed, shuffle=True)
                for index in indexes
            ]
            self._opened |= dict.fromkeys(self._workers.slots_of(worker), opened)
        self._facts = facts_of(corpora, indexes)
        self._data_sha256 = identity_of(corpora, indexes)
        self._num_pairs = [index.num_samples for index in indexes]
        self._lines = [_Line(0, 0)] * len(indexes)

    @property
    def facts(self) -> Facts:
        """What is known about the data."""
        return self._facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The data's own tokenizer."""
        return self._opened[self._slots[0]][0].tokenizer

    @property
    def num_skipped(self) -> int:
        """Damaged pairs of this rank that were replaced by padding since it was built."""
        return sum(pairs.num_skipped for pairs in self._corpora_of_workers())

    def _corpora_of_workers(self) -> Iterator[_Pairs]:
        for worker in range(self._workers.num_workers):
            yield from self._opened[self._workers.slots_of(worker)[0]]

    def next_batch(self) -> PairBatch:
        """This rank's pairs of the next optimizer step, slots ascending.

        Raises:
            CorruptSampleError: If a pair is damaged and ``on_corrupt`` is ``stop``.
        """
        step = self._step(self._lines)
        seq_len = self._config.seq_len_at(step)
        lines, places = list(self._lines), []
        for slot in range(self._global_batch):
            corpus = self._blend.corpus(step, slot)
            places.append((corpus, lines[corpus]))
            lines[corpus] = lines[corpus].after(self._num_pairs[corpus])

        def row(slot: int) -> PairRow:
            corpus, line = places[slot]
            return self._opened[slot][corpus].row(*line, seq_len)

        rows = self._workers.map(row)
        self._lines = lines
        return self._opened[self._slots[0]][0].maker.stack(rows, self._slots)

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

    def identity(self) -> dict[str, str | int]:
        """What a state belongs to: equal identities mean that states can be exchanged."""
        return {
            "data_sha256": self._data_sha256,
            "seed": self._seed,
            "global_batch": self._global_batch,
            "shuffle_block": self._config.shuffle_block,
        }

    def close(self) -> None:
        """End the workers and close the open shards."""
        self._workers.close()
        for pairs in self._corpora_of_workers():
            pairs.reader.close()


class PairEvalStream:
    """Held-out pairs in stored order, each once: the same numbers for any ranks.

    Every rank gives the same number of batches; where no pair is left its row is padding without
    targets. Iterate as often as you like.

    Args:
        data_dir: A folder of pairs made by ``prepare`` (its ``eval``).
        config: The recipe's data section, with ``target_len``.
        global_batch: Pairs per batch, over all ranks.
        data_rank: Data-parallel rank.
        data_world: Data-parallel ranks; must divide ``global_batch``.
        num_batches: Stop after so many; None reads all.
        pad_multiple: Sources and targets are padded to a multiple of it.
        tokenizer_sha256: Refuse a data set of another tokenizer than this.

    Raises:
        DataError: If the data set is damaged, holds no pairs, or has another tokenizer.
        ValueError: If the ranks do not divide the batch.
    """

    def __init__(
        self,
        data_dir: Path | str,
        config: DataConfig,
        *,
        global_batch: int,
        data_rank: int,
        data_world: int,
        num_batches: int | None = None,
        pad_multiple: int = 1,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self._slots = slots_of_rank(global_batch, data_rank, data_world)
        self._global_batch, self._num_batches = global_batch, num_batches
        index = load_index(data_dir, config.cache)
        index.check_content("pairs")
        if tokenizer_sha256 is not None:
            index.check_tokenizer(tokenizer_sha256, "the training data")
        self._pairs = _Pairs(index, config, pad_multiple=pad_multiple, seed=0, shuffle=False)

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""
        return self._pairs.index

    @property
    def tokenizer(self) -> Tokenizer:
        """The data set's own tokenizer."""
        return self._pairs.tokenizer

    def __iter__(self) -> Iterator[PairBatch]:
        """One pass."""
        pairs, num_pairs, seq_len = self._pairs, self.index.num_samples, self._pairs.config.seq_len
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
        pairs = self._pairs
        num_source, num_tokens = pairs.reader.pair_lengths(key.shard, key.sample)
        parts = ((0, num_source), (num_source, num_tokens))
        source, target = (
            pairs.tokenizer.decode(pairs.reader.read(key.shard, key.sample, *part).tolist())
            for part in parts
        )
        return source, target

    def close(self) -> None:
        """Close the open shards."""
        self._pairs.reader.close()
