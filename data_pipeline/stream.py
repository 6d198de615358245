"""The streams of documents: exact, resumable by integers, the same for every number of ranks.

Every slot of the global batch has a stream of its own in every corpus. A sequence spans the end of
an epoch where it must; no text is dropped and none is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.batch import Batch, Row, RowMaker, stack
from haloformer.data_pipeline.causal import NextToken
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import Content, ShardIndex
from haloformer.data_pipeline.mlm import Masker, MaskKey
from haloformer.data_pipeline.packing import Layout, Take, pack_isolated, pack_joined
from haloformer.data_pipeline.rank_stream import HeldOutStream, RankStream
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Tokenizer
from haloformer.data_pipeline.walker import Cursor, Epochs, Walker

Labels = Literal["masked", "next"]  # fill in what was masked, or tell what follows


class _Documents:
    """One corpus as one thread reads it: its files, and what becomes of its text."""

    def __init__(
        self, index: ShardIndex, config: DataConfig, *, pad_multiple: int, labels: Labels
    ) -> None:
        self.index, self._config = index, config
        self.walkers: dict[int, Walker] = {}  # of training: one per slot
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

    @property
    def num_skipped(self) -> int:
        """Damaged documents passed over by its streams."""
        return sum(walker.num_skipped for walker in self.walkers.values())

    def open_walker(self, epochs: Epochs, stream: int, num_epochs: int | None = None) -> Walker:
        """A stream from its beginning."""
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


class TrainStream(RankStream[_Documents]):
    """This rank's part of every global batch, for ever: see ``RankStream``."""

    content: ClassVar[Content] = "documents"
    labels: ClassVar[Labels] = "masked"

    def _open(self, index: ShardIndex, slots: Sequence[int]) -> _Documents:
        documents = _Documents(
            index, self._config, pad_multiple=self._pad_multiple, labels=self.labels
        )
        epochs = Epochs(
            documents.reader,
            seed=self._seed,
            shuffle_block=self._config.shuffle_block,
            num_streams=self._global_batch,
            streams=slots,
        )
        for slot in slots:
            documents.walkers[slot] = documents.open_walker(epochs, slot)
        return documents

    def _walkers(self, slot: int) -> list[Walker]:
        """The streams of a slot, one per corpus."""
        return [documents.walkers[slot] for documents in self._opened[slot]]

    def next_batch(self) -> Batch:
        """This rank's sequences of the next optimizer step, slots ascending.

        ``state_dict`` is the state after the last batch given, so whoever prefetches keeps both
        together.

        Raises:
            CorruptSampleError: If a document is damaged and ``on_corrupt`` is ``stop``.
        """
        return _batch(self._workers.map(self._row), self._slots, self._config)

    def _row(self, slot: int) -> Row:
        walkers = self._walkers(slot)
        # A slot makes one sequence in every step, from one of its corpora.
        step = sum(walker.cursor.sequence for walker in walkers)
        number = self._blend.corpus(step, slot)
        documents, walker = self._opened[slot][number], walkers[number]
        key = MaskKey(self._seed, walker.cursor.epoch, slot, step)
        seq_len = self._config.seq_len
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
            str(slot): [part for walker in self._walkers(slot) for part in walker.cursor]
            for slot in self._slots
        }

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from the union of all ranks' states, at any number of ranks.

        Raises:
            DataError: If streams are missing or do not fit this data and batch; nothing is
                changed then.
        """
        cursors = self._cursors_of(state)
        before = {slot: [w.cursor for w in self._walkers(slot)] for slot in self._slots}
        try:
            self._go_to(cursors)
        except DataError:
            self._go_to(before)
            raise

    def _go_to(self, cursors: Mapping[int, Sequence[Cursor]]) -> None:
        for slot in self._slots:
            for walker, cursor in zip(self._walkers(slot), cursors[slot], strict=True):
                walker.cursor = cursor

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
        num_parts = size * len(self._first)
        steps = set()
        for slot, parts in state.items():
            if len(parts) != num_parts or not all(type(part) is int for part in parts):
                raise DataError(
                    f"the state of stream {slot} is not {num_parts} integers",
                    remedy="resume with the data of the run, and as many corpora",
                )
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


class EvalStream(HeldOutStream[_Documents]):
    """Held-out sequences in stored order with fixed masks: see ``HeldOutStream``.

    Batches have the same shape on every rank.
    """

    content: ClassVar[Content] = "documents"
    labels: ClassVar[Labels] = "masked"

    def _open(self, index: ShardIndex) -> _Documents:
        return _Documents(index, self._config, pad_multiple=self._pad_multiple, labels=self.labels)

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Every rank lays out every sequence and reads its own."""
        documents, seq_len, walker = self._corpus, self._config.seq_len, self._walker()
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
        reader = self._corpus.reader
        epochs = Epochs(reader, seed=0, shuffle_block=1, num_streams=1, streams=[0], shuffle=False)
        return self._corpus.open_walker(epochs, 0, num_epochs=1)


class CausalTrainStream(TrainStream):
    """As ``TrainStream``; nothing is masked, and every token is to predict the next."""

    labels: ClassVar[Labels] = "next"


class CausalEvalStream(EvalStream):
    """As ``EvalStream``; nothing is masked, and every token is to predict the next."""

    labels: ClassVar[Labels] = "next"
