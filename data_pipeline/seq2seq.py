"""The streams of pairs: exact, resumable by two integers, the same for every number of ranks.

The epochs' pairs, each epoch permuted by (seed, epoch), form one endless line. Pair number k of the
line feeds slot k % global_batch; data-parallel rank r of R makes the slots with i % R == r:

    5 pairs, global batch 4:     epoch 0: c a e b d     epoch 1: b d a c e
                                 step 0:  c a e b       step 1:  d b d a      step 2: ...
    slot                                  0 1 2 3                0 1 2 3

No pair is left out and none is read twice in an epoch, whatever the batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.order import EpochOrder
from haloformer.data_pipeline.pairs import PairBatch, PairKey, PairMaker, PairRow
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.stream import slots_of_rank
from haloformer.data_pipeline.tokenizers import Tokenizer

_MAX_EPOCHS = 8  # orders kept in memory; a batch lies in one or two epochs, a huge one in more


class _PairSide:
    """What training and evaluation share: the data set, this rank's slots, orders and rows."""

    def __init__(
        self,
        data_dir: Path,
        config: DataConfig,
        *,
        slots: range,
        pad_multiple: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        assert config.target_len is not None, "checked with the recipe"
        self.index: ShardIndex = load_index(data_dir)
        self.index.check_content("pairs")
        self.tokenizer: Tokenizer = self.index.load_tokenizer()
        self.reader = ShardReader(self.index, config.on_corrupt)
        self.config, self.slots = config, slots
        self.num_skipped = 0
        self.maker = PairMaker(
            self.reader,
            self.tokenizer.specials,
            seq_len=config.seq_len,
            target_len=config.target_len,
            pad_multiple=pad_multiple,
            has_globals=config.global_tokens == "first",
        )
        self._seed, self._shuffle = seed, shuffle
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()

    def row(self, epoch: int, position: int) -> PairRow:
        """The pair at a position of an epoch; a damaged one is padding where that is allowed."""
        shards, samples = self._order(epoch).documents(position, 1)
        key = PairKey(epoch, int(shards[0]), int(samples[0]))
        try:
            return self.maker.make(key)
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


class PairTrainStream:
    """This rank's part of every global batch of pairs, for ever.

    Args:
        data_dir: A folder of pairs made by ``prepare`` (its ``train``).
        config: The recipe's data section, with ``target_len``.
        seed: Seed of the run: the order.
        global_batch: Pairs per optimizer step, over all ranks.
        data_rank: Data-parallel rank (ranks of one context-parallel group pass the same).
        data_world: Data-parallel ranks; must divide ``global_batch``.
        pad_multiple: Sources and targets are padded to a multiple of it (the context-parallel
            size).

    Raises:
        DataError: If the data set is damaged, or holds no pairs.
        ValueError: If the ranks do not divide the batch.
    """

    def __init__(
        self,
        data_dir: Path,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        data_rank: int,
        data_world: int,
        pad_multiple: int = 1,
    ) -> None:
        slots = slots_of_rank(global_batch, data_rank, data_world)
        self._side = _PairSide(
            data_dir, config, slots=slots, pad_multiple=pad_multiple, seed=seed, shuffle=True
        )
        self._seed, self._global_batch = seed, global_batch
        self._epoch = self._position = 0

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""
        return self._side.index

    @property
    def tokenizer(self) -> Tokenizer:
        """The data set's own tokenizer."""
        return self._side.tokenizer

    @property
    def num_skipped(self) -> int:
        """Damaged pairs of this rank that were replaced by padding since it was built."""
        return self._side.num_skipped

    def next_batch(self) -> PairBatch:
        """This rank's pairs of the next optimizer step, slots ascending.

        Raises:
            CorruptSampleError: If a pair is damaged and ``on_corrupt`` is ``stop``.
        """
        rows = [self._side.row(*self._place(slot)) for slot in self._side.slots]
        self._epoch, self._position = self._place(self._global_batch)
        return self._side.maker.stack(rows, self._side.slots)

    def _place(self, ahead: int) -> tuple[int, int]:
        """Epoch and position of the pair that many after the next."""
        epochs, position = divmod(self._position + ahead, self.index.num_samples)
        return self._epoch + epochs, position

    def state_dict(self) -> dict[str, list[int]]:
        """Epoch and position of the next pair: the state of the run, the same on every rank."""
        return {"pairs": [self._epoch, self._position]}

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from a state, at any number of ranks.

        Raises:
            DataError: If it is not one of this data set; nothing is changed then.
        """
        place = list(state["pairs"]) if set(state) == {"pairs"} else []
        whole = len(place) == 2 and all(type(part) is int and part >= 0 for part in place)
        if not whole or place[1] >= self.index.num_samples:
            raise DataError(
                f"the state {dict(state)} is no epoch and position below {self.index.num_samples}",
                file=self.index.folder,
                remedy="resume with the data of the run",
            )
        self._epoch, self._position = place

    def identity(self) -> dict[str, str | int]:
        """What a state belongs to: equal identities mean that states can be exchanged."""
        return {
            "data_sha256": self.index.sha256,
            "seed": self._seed,
            "global_batch": self._global_batch,
            "shuffle_block": self._side.config.shuffle_block,
        }

    def close(self) -> None:
        """Close the open shards."""
        self._side.reader.close()


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
        data_dir: Path,
        config: DataConfig,
        *,
        global_batch: int,
        data_rank: int,
        data_world: int,
        num_batches: int | None = None,
        pad_multiple: int = 1,
        tokenizer_sha256: str | None = None,
    ) -> None:
        slots = slots_of_rank(global_batch, data_rank, data_world)
        self._side = _PairSide(
            data_dir, config, slots=slots, pad_multiple=pad_multiple, seed=0, shuffle=False
        )
        self._global_batch, self._num_batches = global_batch, num_batches
        if tokenizer_sha256 is not None:
            self.index.check_tokenizer(tokenizer_sha256, "the training data")

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""
        return self._side.index

    @property
    def tokenizer(self) -> Tokenizer:
        """The data set's own tokenizer."""
        return self._side.tokenizer

    def __iter__(self) -> Iterator[PairBatch]:
        """One pass."""
        side, num_pairs = self._side, self.index.num_samples
        num_batches = -(-num_pairs // self._global_batch)
        if self._num_batches is not None:
            num_batches = min(num_batches, self._num_batches)
        for number in range(num_batches):
            places = [number * self._global_batch + slot for slot in side.slots]
            rows = [side.row(0, at) if at < num_pairs else side.maker.padding() for at in places]
            yield side.maker.stack(rows, side.slots)

    def texts(self, key: PairKey) -> tuple[str, str]:
        """Source and target of a pair as they were written, not cut."""
        side = self._side
        num_source, num_tokens = side.reader.pair_lengths(key.shard, key.sample)
        parts = ((0, num_source), (num_source, num_tokens))
        source, target = (
            side.tokenizer.decode(side.reader.read(key.shard, key.sample, *part).tolist())
            for part in parts
        )
        return source, target

    def close(self) -> None:
        """Close the open shards."""
        self._side.reader.close()
