"""The streams a trainer reads: exact, resumable by integers, the same for every number of ranks.

Slot i of every global batch is fed by logical stream i. Data-parallel rank r of R makes the slots
with i % R == r, ascending, so the union over ranks is the same batch for every R that divides it:

    global batch 4:   slot 0  1  2  3
    R = 1:                 0  0  0  0
    R = 2:                 0  1  0  1       ranks of one context-parallel group read the same slots

A sequence spans the end of an epoch where it must; no text is dropped and none is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.batch import Batch, Row, RowMaker, stack
from haloformer.data_pipeline.causal import NextToken
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.mlm import Masker, MaskKey
from haloformer.data_pipeline.packing import Layout, Take, pack_isolated, pack_joined
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Tokenizer
from haloformer.data_pipeline.walker import Cursor, Epochs, Walker

Labels = Literal["masked", "next"]  # fill in what was masked, or tell what follows


def slots_of_rank(global_batch: int, data_rank: int, data_world: int) -> range:
    """The slots of every global batch that a data-parallel rank makes.

    Raises:
        ValueError: If there is no such rank, or the ranks do not divide the batch.
    """
    if not 0 <= data_rank < data_world:
        raise ValueError(f"data_rank {data_rank} is not one of {data_world} ranks")
    if global_batch < 1 or global_batch % data_world:
        raise ValueError(
            f"global_batch {global_batch} is not a multiple of {data_world} data-parallel "
            "ranks; change batch.global_batch or the number of ranks"
        )
    return range(data_rank, global_batch, data_world)


class _DataSide:
    """What training and evaluation share: the data set, this rank's slots, rows and batches."""

    def __init__(
        self,
        data_dir: Path,
        config: DataConfig,
        *,
        global_batch: int,
        data_rank: int,
        data_world: int,
        pad_multiple: int,
        labels: Labels,
    ) -> None:
        self.config = config
        self.global_batch = global_batch
        self.slots = slots_of_rank(global_batch, data_rank, data_world)
        self.index: ShardIndex = load_index(data_dir)
        self.index.check_content("documents")
        self.tokenizer: Tokenizer = self.index.load_tokenizer()
        self.reader = ShardReader(self.index, config.on_corrupt)
        specials, vocab_size = self.tokenizer.specials, self.tokenizer.vocab_size
        self.rows = RowMaker(
            self.reader,
            specials,
            NextToken(specials)
            if labels == "next"
            else Masker(vocab_size, specials, config.mask_probability),
            width=-(-config.seq_len // pad_multiple) * pad_multiple,
            has_globals=config.global_tokens == "first",
        )
        self._pack: Callable[[Take, int], Layout | None] = (
            pack_isolated if config.isolate_documents else pack_joined
        )

    def layout(self, walker: Walker) -> Layout | None:
        """The next sequence of a stream, not read yet."""
        return self._pack(walker.take, self.config.seq_len)

    def batch(self, rows: Sequence[Row], slots: Sequence[int]) -> Batch:
        """Stack this rank's rows."""
        return stack(
            rows,
            slots,
            num_globals=int(self.config.global_tokens == "first"),
            isolate=self.config.isolate_documents,
        )


class TrainStream:
    """This rank's part of every global batch, for ever.

    Args:
        data_dir: A folder made by ``prepare`` (its ``train``).
        config: The recipe's data section.
        seed: Seed of the run: order and masks.
        global_batch: Sequences per optimizer step, over all ranks.
        data_rank: Data-parallel rank (ranks of one context-parallel group pass the same).
        data_world: Data-parallel ranks; must divide ``global_batch``.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).

    Raises:
        DataError: If the data set is damaged, or too small for so many streams.
        ValueError: If the ranks do not divide the batch.
    """

    labels: ClassVar[Labels] = "masked"

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
        self._side = _DataSide(
            data_dir,
            config,
            global_batch=global_batch,
            data_rank=data_rank,
            data_world=data_world,
            pad_multiple=pad_multiple,
            labels=self.labels,
        )
        self._seed = seed
        reader = self._side.reader
        epochs = Epochs(
            reader,
            seed=seed,
            shuffle_block=config.shuffle_block,
            num_streams=global_batch,
            streams=self._side.slots,
        )
        skip = config.on_corrupt == "skip"
        self._walkers = {
            slot: Walker(epochs, reader, slot, skip_corrupt=skip) for slot in self._side.slots
        }

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set (``bytes_per_token``, ``vocab_size`` ...)."""
        return self._side.index

    @property
    def tokenizer(self) -> Tokenizer:
        """The data set's own tokenizer."""
        return self._side.tokenizer

    @property
    def num_skipped(self) -> int:
        """Damaged documents passed over by this rank's streams since it was built."""
        return sum(walker.num_skipped for walker in self._walkers.values())

    def next_batch(self) -> Batch:
        """This rank's sequences of the next optimizer step, slots ascending.

        ``state_dict`` is the state after the last batch given, so whoever prefetches keeps both
        together.

        Raises:
            CorruptSampleError: If a document is damaged and ``on_corrupt`` is ``stop``.
        """
        rows = []
        for slot, walker in self._walkers.items():
            at = walker.cursor
            layout = self._side.layout(walker)
            assert layout is not None, "a stream without end has ended"
            walker.next_sequence()
            rows.append(
                self._side.rows.make(layout, MaskKey(self._seed, at.epoch, slot, at.sequence))
            )
        return self._side.batch(rows, self._side.slots)

    def state_dict(self) -> dict[str, list[int]]:
        """Four integers (epoch, position, offset, sequence) for each stream of this rank.

        The union over data-parallel ranks is the state of the run.
        """
        return {str(slot): list(walker.cursor) for slot, walker in self._walkers.items()}

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from the union of all ranks' states, at any number of ranks.

        Raises:
            DataError: If streams are missing or do not fit this data set and batch; nothing is
                changed then.
        """
        expected = {str(slot) for slot in range(self._side.global_batch)}
        if set(state) != expected:
            raise DataError(
                f"the state holds {len(state)} streams, global_batch {self._side.global_batch} "
                "needs one for each of its sequences",
                file=self.index.folder,
                remedy="resume with the global_batch of the run, and the states of all its ranks",
            )
        before = {slot: walker.cursor for slot, walker in self._walkers.items()}
        try:
            for slot, walker in self._walkers.items():
                if len(state[str(slot)]) != len(Cursor._fields):
                    raise DataError(f"the state of stream {slot} is not four integers")
                walker.cursor = Cursor(*state[str(slot)])
        except DataError:
            for slot, walker in self._walkers.items():
                walker.cursor = before[slot]
            raise

    def identity(self) -> dict[str, str | int]:
        """What a state belongs to: equal identities mean that states can be exchanged."""
        return {
            "data_sha256": self.index.sha256,
            "seed": self._seed,
            "global_batch": self._side.global_batch,
            "shuffle_block": self._side.config.shuffle_block,
        }

    def close(self) -> None:
        """Close the open shards."""
        self._side.reader.close()


class EvalStream:
    """Held-out sequences in stored order with fixed masks: the same numbers for any ranks.

    Every rank gives the same number of batches of the same shape; where a rank has no sequence
    left its row is padding without targets. Iterate as often as you like.

    Args:
        data_dir: A folder made by ``prepare`` (its ``eval``).
        config: The recipe's data section.
        global_batch: Sequences per batch, over all ranks.
        data_rank: Data-parallel rank.
        data_world: Data-parallel ranks; must divide ``global_batch``.
        num_batches: Stop after so many; None reads all.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).
        tokenizer_sha256: Refuse a data set of another tokenizer than this.

    Raises:
        DataError: If the data set is damaged, or has another tokenizer.
        ValueError: If the ranks do not divide the batch.
    """

    labels: ClassVar[Labels] = "masked"

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
        self._side = _DataSide(
            data_dir,
            config,
            global_batch=global_batch,
            data_rank=data_rank,
            data_world=data_world,
            pad_multiple=pad_multiple,
            labels=self.labels,
        )
        self._num_batches = num_batches
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

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Every rank lays out every sequence and reads its own."""
        walker = self._walker()
        sequence = num_given = 0
        while num_given != self._num_batches:
            rows = {}
            for slot in range(self._side.global_batch):
                layout = self._side.layout(walker)
                if layout is None and slot == 0:
                    return
                if slot in self._side.slots:
                    rows[slot] = (
                        self._side.rows.padding()
                        if layout is None
                        else self._side.rows.make(layout, MaskKey.of_evaluation(sequence))
                    )
                sequence += 1
            yield self._side.batch(list(rows.values()), list(rows))
            num_given += 1

    def _walker(self) -> Walker:
        reader, config = self._side.reader, self._side.config
        epochs = Epochs(reader, seed=0, shuffle_block=1, num_streams=1, streams=[0], shuffle=False)
        skip = config.on_corrupt == "skip"
        return Walker(epochs, reader, 0, skip_corrupt=skip, num_epochs=1)

    def close(self) -> None:
        """Close the open shards."""
        self._side.reader.close()


class CausalTrainStream(TrainStream):
    """As ``TrainStream``; nothing is masked, and every token is to predict the next."""

    labels: ClassVar[Labels] = "next"


class CausalEvalStream(EvalStream):
    """As ``EvalStream``; nothing is masked, and every token is to predict the next."""

    labels: ClassVar[Labels] = "next"
