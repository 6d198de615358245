"""What the streams of documents and of pairs share: a rank's slots, its workers, its corpora.

Slot i of every global batch is fed by logical stream i. Data-parallel rank r of R makes the slots
with i % R == r, ascending, so the union over ranks is the same batch for every R that divides it:

    global batch 4:   slot 0  1  2  3
    R = 1:                 0  0  0  0
    R = 2:                 0  1  0  1       ranks of one context-parallel group read the same slots
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

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
from haloformer.data_pipeline.index import Content, ShardIndex, load_index
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Tokenizer
from haloformer.data_pipeline.workers import Workers


class OpenCorpus(Protocol):
    """A corpus as one thread reads it; nothing in it is shared with another thread."""

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its own tokenizer."""

    @property
    def reader(self) -> ShardReader:
        """Its files."""

    @property
    def num_skipped(self) -> int:
        """Damaged samples passed over."""


C = TypeVar("C", bound=OpenCorpus)


def seed_of_phase(seed: int, phase: int) -> int:
    """The seed of the data of a phase of a run: every phase has an order of its own.

    Phase 0 has the run's, so that a run without phases is its own first phase.
    """
    if phase == 0:
        return seed
    key = seed.to_bytes(8, "little") + phase.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8, person=b"phase").digest()
    return int.from_bytes(digest, "little") >> 1  # a recipe's seed is below 2**63


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


class RankStream(ABC, Generic[C]):
    """A rank's part of every global batch, for ever.

    Args:
        data: A folder made by ``prepare`` (its ``train``), a path or URL; or several with weights.
        config: The recipe's data section.
        seed: Order and masks; see ``seed_of_phase``.
        global_batch: Sequences (pairs) per optimizer step, over all ranks.
        data_rank: Data-parallel rank (ranks of one context-parallel group pass the same).
        data_world: Data-parallel ranks; must divide ``global_batch``.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).

    Raises:
        DataError: If a data set is damaged, holds something else, was made with another tokenizer
            than the others, or is too small for so many streams.
        ValueError: If the ranks do not divide the batch.
    """

    content: ClassVar[Content]

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
        self._config, self._seed, self._global_batch = config, seed, global_batch
        self._pad_multiple = pad_multiple
        self._workers = Workers(config.workers, self._slots)
        corpora = as_corpora(data)
        self._blend = Blend([corpus.weight for corpus in corpora], seed)
        self._opened: dict[int, list[C]] = {}  # of each slot: its worker's, one per corpus
        for worker in range(self._workers.num_workers):
            slots = self._workers.slots_of(worker)
            indexes = open_corpora(corpora, self.content, config.cache)
            opened = [self._open(index, slots) for index in indexes]
            self._opened |= dict.fromkeys(slots, opened)
        self._first = self._opened[self._slots[0]]
        self._facts = facts_of(corpora, indexes)
        self._data_sha256 = identity_of(corpora, indexes)

    @abstractmethod
    def _open(self, index: ShardIndex, slots: Sequence[int]) -> C:
        """Open a corpus for a worker that makes some slots."""

    def _all_opened(self) -> Iterator[C]:
        for worker in range(self._workers.num_workers):
            yield from self._opened[self._workers.slots_of(worker)[0]]

    @property
    def facts(self) -> Facts:
        """What is known about the data (``characters_per_token``, ``vocab_size`` ...)."""
        return self._facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The data's own tokenizer."""
        return self._first[0].tokenizer

    @property
    def num_skipped(self) -> int:
        """Damaged samples passed over by this rank since the stream was built."""
        return sum(corpus.num_skipped for corpus in self._all_opened())

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
        for corpus in self._all_opened():
            corpus.reader.close()


class HeldOutStream(ABC, Generic[C]):
    """Held-out data in stored order, each once: the same numbers for any ranks.

    Every rank gives the same number of batches; where a rank has nothing left its row is padding
    without targets. Iterate as often as you like.

    Args:
        data_dir: A folder made by ``prepare`` (its ``eval``), a path or URL.
        config: The recipe's data section.
        global_batch: Sequences (pairs) per batch, over all ranks.
        data_rank: Data-parallel rank.
        data_world: Data-parallel ranks; must divide ``global_batch``.
        num_batches: Stop after so many; None reads all.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).
        tokenizer_sha256: Refuse a data set of another tokenizer than this.

    Raises:
        DataError: If the data set is damaged, holds something else, or has another tokenizer.
        ValueError: If the ranks do not divide the batch.
    """

    content: ClassVar[Content]

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
        self._config, self._pad_multiple = config, pad_multiple
        self._global_batch, self._num_batches = global_batch, num_batches
        index = load_index(data_dir, config.cache)
        index.check_content(self.content)
        if tokenizer_sha256 is not None:
            index.check_tokenizer(tokenizer_sha256, "the training data")
        self._corpus = self._open(index)

    @abstractmethod
    def _open(self, index: ShardIndex) -> C:
        """Open the data set."""

    @property
    def index(self) -> ShardIndex:
        """What is known about the data set."""
        return self._corpus.index

    @property
    def tokenizer(self) -> Tokenizer:
        """The data set's own tokenizer."""
        return self._corpus.tokenizer

    def close(self) -> None:
        """Close the open shards."""
        self._corpus.reader.close()
