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
from typing import ClassVar, Literal, NamedTuple

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.batch import Batch, Row, RowMaker, stack
from haloformer.data_pipeline.blend import (
    Blend,
    Corpora,
    Facts,
    as_corpora,
    facts_of,
    identity_of,
    open_corpora,
)
from haloformer.data_pipeline.causal import NextToken
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.mlm import Masker, MaskKey
from haloformer.data_pipeline.packing import Layout, Take, pack_isolated, pack_joined
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Tokenizer
from haloformer.data_pipeline.walker import Cursor, Epochs, Walker
from haloformer.data_pipeline.workers import Workers

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


class _Documents:
    """One corpus as one thread reads it: its files, and what becomes of its text."""

    def __init__(
        self, index: ShardIndex, config: DataConfig, *, pad_multiple: int, labels: Labels
    ) -> None:
        self.index, self._config = index, config
        self.tokenizer: Tokenizer = index.load_tokenizer()
        self.reader = ShardReader(index, config.on_corrupt)
        specials, vocab_size = self.tokenizer.specials, self.tokenizer.vocab_size
        self.rows = RowMaker(
            self.reader,
            specials,
            NextToken(vocab_size, specials)
            if labels == "next"
            else Masker(vocab_size, specials, config.mask_probability),
            pad_multiple=pad_multiple,
            has_globals=config.global_tokens == "first",
        )
        self._pack: Callable[[Take, int], Layout | None] = (
            pack_isolated if config.isolate_documents else pack_joined
        )

    def walker(self, epochs: Epochs, stream: int, num_epochs: int | None = None) -> Walker:
        """One stream of the corpus."""
        skip = self._config.on_corrupt == "skip"
        return Walker(epochs, self.reader, stream, skip_corrupt=skip, num_epochs=num_epochs)

    def layout(self, walker: Walker, seq_len: int) -> Layout | None:
        """The next sequence of a stream, not read yet."""
        return self._pack(walker.take, seq_len)


def _batch(rows: Sequence[Row], slots: Sequence[int], config: DataConfig) -> Batch:
    return stack(
        rows,
        slots,
        num_globals=int(config.global_tokens == "first"),
        isolate=config.isolate_documents,
    )


class _Lane(NamedTuple):
    """One stream of one corpus."""

    documents: _Documents
    walker: Walker


class TrainStream:
    """This rank's part of every global batch, for ever.

    Args:
        data: A folder made by ``prepare`` (its ``train``), a path or URL; or several with weights.
        config: The recipe's data section.
        seed: Seed of the run: order and masks.
        global_batch: Sequences per optimizer step, over all ranks.
        data_rank: Data-parallel rank (ranks of one context-parallel group pass the same).
        data_world: Data-parallel ranks; must divide ``global_batch``.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).

    Raises:
        DataError: If a data set is damaged, too small for so many streams, or made with another
            tokenizer than the others.
        ValueError: If the ranks do not divide the batch.
    """

    labels: ClassVar[Labels] = "masked"

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
        self._lanes: dict[int, list[_Lane]] = {}  # of each slot, one per corpus
        self._opened: list[_Documents] = []
        for worker in range(self._workers.num_workers):
            indexes = open_corpora(corpora, "documents", config.cache)
            self._facts = facts_of(corpora, indexes)
            self._data_sha256 = identity_of(corpora, indexes)
            for index in indexes:
                documents = _Documents(index, config, pad_multiple=pad_multiple, labels=self.labels)
                self._opened.append(documents)
                self._open_lanes(documents, self._workers.slots_of(worker))

    def _open_lanes(self, documents: _Documents, slots: Sequence[int]) -> None:
        epochs = Epochs(
            documents.reader,
            seed=self._seed,
            shuffle_block=self._config.shuffle_block,
            num_streams=self._global_batch,
            streams=slots,
        )
        for slot in slots:
            lane = _Lane(documents, documents.walker(epochs, slot))
            self._lanes.setdefault(slot, []).append(lane)

    @property
    def facts(self) -> Facts:
        """What is known about the data (``characters_per_token``, ``vocab_size`` ...)."""
        return self._facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The data's own tokenizer."""
        return self._opened[0].tokenizer

    @property
    def num_skipped(self) -> int:
        """Damaged documents passed over by this rank's streams since it was built."""
        return sum(lane.walker.num_skipped for lanes in self._lanes.values() for lane in lanes)

    def next_batch(self) -> Batch:
        """This rank's sequences of the next optimizer step, slots ascending.

        ``state_dict`` is the state after the last batch given, so whoever prefetches keeps both
        together.

        Raises:
            CorruptSampleError: If a document is damaged and ``on_corrupt`` is ``stop``.
        """
        return _batch(self._workers.map(self._row), self._slots, self._config)

    def _row(self, slot: int) -> Row:
        lanes = self._lanes[slot]
        # A slot makes one sequence in every step, from one of its corpora.
        step = sum(lane.walker.cursor.sequence for lane in lanes)
        documents, walker = lanes[self._blend.corpus(step, slot)]
        key = MaskKey(self._seed, walker.cursor.epoch, slot, step)
        seq_len = self._config.seq_len_at(step)
        layout = documents.layout(walker, seq_len)
        assert layout is not None, "a stream without end has ended"
        walker.next_sequence()
        return documents.rows.make(layout, key, seq_len)

    def state_dict(self) -> dict[str, list[int]]:
        """Four integers (epoch, position, offset, sequence) for each stream of this rank.

        Of several corpora each has its four, one after the other. The union over data-parallel
        ranks is the state of the run.
        """
        return {
            str(slot): [part for lane in lanes for part in lane.walker.cursor]
            for slot, lanes in self._lanes.items()
        }

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from the union of all ranks' states, at any number of ranks.

        Raises:
            DataError: If streams are missing or do not fit this data and batch; nothing is
                changed then.
        """
        cursors = self._cursors_of(state)
        before = {slot: [lane.walker.cursor for lane in self._lanes[slot]] for slot in self._slots}
        try:
            self._go_to(cursors)
        except DataError:
            self._go_to(before)
            raise

    def _go_to(self, cursors: Mapping[int, Sequence[Cursor]]) -> None:
        for slot, lanes in self._lanes.items():
            for lane, cursor in zip(lanes, cursors[slot], strict=True):
                lane.walker.cursor = cursor

    def _cursors_of(self, state: Mapping[str, Sequence[int]]) -> dict[int, list[Cursor]]:
        """Slot -> a cursor of each corpus, of all slots of the run."""
        if set(state) != {str(slot) for slot in range(self._global_batch)}:
            raise DataError(
                f"the state holds {len(state)} streams, global_batch {self._global_batch} needs "
                "one for each of its sequences",
                file=self._facts.place,
                remedy="resume with the global_batch of the run, and the states of all its ranks",
            )
        size = len(Cursor._fields)
        num_parts = size * len(self._lanes[self._slots[0]])
        steps = set()
        for slot, parts in state.items():
            if len(parts) != num_parts or not all(type(part) is int for part in parts):
                raise DataError(f"the state of stream {slot} is not {num_parts} integers")
            steps.add(sum(parts[size - 1 :: size]))
        if len(steps) > 1:
            raise DataError(
                f"the state mixes streams of steps {sorted(steps)}",
                remedy="resume with the states of one checkpoint",
            )
        return {
            int(slot): [Cursor(*parts[at : at + size]) for at in range(0, num_parts, size)]
            for slot, parts in state.items()
        }

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
        for documents in self._opened:
            documents.reader.close()


class EvalStream:
    """Held-out sequences in stored order with fixed masks: the same numbers for any ranks.

    Every rank gives the same number of batches of the same shape; where a rank has no sequence
    left its row is padding without targets. Iterate as often as you like.

    Args:
        data_dir: A folder made by ``prepare``, a path or URL (its ``eval``).
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
        self._config = config
        index = load_index(data_dir, config.cache)
        index.check_content("documents")
        if tokenizer_sha256 is not None:
            index.check_tokenizer(tokenizer_sha256, "the training data")
        self._documents = _Documents(index, config, pad_multiple=pad_multiple, labels=self.labels)

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""
        return self._documents.index

    @property
    def tokenizer(self) -> Tokenizer:
        """The data set's own tokenizer."""
        return self._documents.tokenizer

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Every rank lays out every sequence and reads its own."""
        documents, seq_len, walker = self._documents, self._config.seq_len, self._walker()
        sequence = num_given = 0
        while num_given != self._num_batches:
            rows = {}
            for slot in range(self._global_batch):
                layout = documents.layout(walker, seq_len)
                if layout is None and slot == 0:
                    return
                if slot in self._slots:
                    rows[slot] = (
                        documents.rows.padding(seq_len)
                        if layout is None
                        else documents.rows.make(layout, MaskKey.of_evaluation(sequence), seq_len)
                    )
                sequence += 1
            yield _batch(list(rows.values()), list(rows), self._config)
            num_given += 1

    def _walker(self) -> Walker:
        reader = self._documents.reader
        epochs = Epochs(reader, seed=0, shuffle_block=1, num_streams=1, streams=[0], shuffle=False)
        return self._documents.walker(epochs, 0, num_epochs=1)

    def close(self) -> None:
        """Close the open shards."""
        self._documents.reader.close()


class CausalTrainStream(TrainStream):
    """As ``TrainStream``; nothing is masked, and every token is to predict the next."""

    labels: ClassVar[Labels] = "next"


class CausalEvalStream(EvalStream):
    """As ``EvalStream``; nothing is masked, and every token is to predict the next."""

    labels: ClassVar[Labels] = "next"
