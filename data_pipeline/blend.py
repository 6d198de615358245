"""Several corpora in one stream: which of them feeds a sequence is a pure function.

Sequence (step, slot) looks at a point of the unit circle, on which each corpus owns an arc as long
as its weight:

    weights 2 : 1        0 [---- corpus 0 ----)[- corpus 1 -) 1
    point = start(seed) + step * 0.618.. + slot * 0.414..   mod 1

Steps turn it by the golden ratio, slots by the square root of two. Turns by such numbers spread
points more evenly than chance: after n of them a corpus has its share of n give or take a few, for
every slot alone, every step alone and all of them together. So no slot runs out of a corpus before
the others, and no number of ranks changes anything.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from haloformer.configs.schema import CacheConfig, DataConfig
from haloformer.data_pipeline.index import Content, ShardIndex, load_index

# Of the circle's 2**64 points: its golden section, and sqrt(2) - 1 of it.
_TURN = 1 << 64
_PER_STEP = 0x9E3779B97F4A7C15
_PER_SLOT = 0x6A09E667F3BCC909


class Corpus(NamedTuple):
    """A data set, and its share of the sequences among all weights."""

    folder: Path | str
    weight: float = 1.0


Corpora = Path | str | Sequence[Corpus]  # a path or an address is a corpus of its own


def training_corpora(config: DataConfig) -> list[Corpus]:
    """What a recipe trains on."""
    return [Corpus(corpus.path, corpus.weight) for corpus in config.corpora]


def as_corpora(data: Corpora) -> Sequence[Corpus]:
    """Several corpora, or a single one as such."""
    return [Corpus(data)] if isinstance(data, Path | str) else data


class Blend:
    """Which corpus feeds which sequence of a run.

    Args:
        weights: Of each corpus, above zero.
        seed: Seed of the run.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        assert weights and all(weight > 0 for weight in weights), weights
        digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8, person=b"blend")
        self._start = int.from_bytes(digest.digest(), "little")
        # Exact, so that no machine rounds a corpus a sequence more.
        total = sum(map(Fraction, weights))
        ends = itertools.accumulate(map(Fraction, weights))
        self._ends = [int(end * _TURN / total) for end in ends]

    def corpus(self, step: int, slot: int) -> int:
        """Number of the corpus that feeds a slot of a step's global batch."""
        point = (self._start + step * _PER_STEP + slot * _PER_SLOT) % _TURN
        return next(number for number, end in enumerate(self._ends) if point < end)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a trainer knows of its data.

    Attributes:
        place: Where it is, for messages.
        vocab_size: Entries of the tokenizer.
        tokenizer_sha256: Which one it is.
        characters_per_token: Bits per character = nats per token / ln 2 / this; of a blend, what a
            token of it has on average.
        labels: Of classification: the classes, in the order of their numbers.
    """

    place: str
    vocab_size: int
    tokenizer_sha256: str
    characters_per_token: float
    labels: tuple[str, ...] = ()


def open_corpora(
    corpora: Sequence[Corpus], wanted: Content, cache: CacheConfig
) -> list[ShardIndex]:
    """Load the indexes of corpora that are to be read together.

    Raises:
        DataError: If one is damaged, holds something else, or has another tokenizer or other labels
            than the first.
    """
    indexes = [load_index(corpus.folder, cache) for corpus in corpora]
    first = indexes[0]
    for index in indexes:
        index.check_content(wanted)
        index.check_tokenizer(first.tokenizer_sha256, f"the corpus {first.folder}")
        index.check_labels(first.labels, f"the corpus {first.folder}")
    return indexes


def facts_of(corpora: Sequence[Corpus], indexes: Sequence[ShardIndex]) -> Facts:
    """The facts of a blend: sequences hold the same number of tokens whatever their corpus."""
    total = sum(corpus.weight for corpus in corpora)
    characters = sum(
        corpus.weight / total * index.characters_per_token
        for corpus, index in zip(corpora, indexes, strict=True)
    )
    return Facts(
        place=" + ".join(str(index.folder) for index in indexes),
        vocab_size=indexes[0].vocab_size,
        tokenizer_sha256=indexes[0].tokenizer_sha256,
        characters_per_token=characters,
        labels=indexes[0].labels,
    )


def identity_of(corpora: Sequence[Corpus], indexes: Sequence[ShardIndex]) -> str:
    """The hash of a data set; of several, each with its weight."""
    if len(indexes) == 1:
        return indexes[0].sha256
    pairs = zip(corpora, indexes, strict=True)
    return ", ".join(f"{corpus.weight!r} x {index.sha256}" for corpus, index in pairs)
