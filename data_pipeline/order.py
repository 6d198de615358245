"""The order of an epoch, as a pure function of (seed, epoch): nothing is shuffled in memory.

Shards are permuted; documents are permuted within blocks of ``shuffle_block`` permuted shards. In
this order all tokens of the epoch, and a separator after each document, form one line of slots,
which is cut evenly into the logical streams:

    documents, permuted:   C C C C C C / A / B B /     9 tokens + 3 separators, 3 streams
    streams:               0 0 0 0 1 1 1 1 2 2 2 2     each owns 4 slots

Cutting slots, not documents, gives every stream the same work, so that all streams stay in one
epoch and one giant document feeds all of them. A permutation is a keyed Feistel network, computed
where it is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finaliser
_MIX_B = np.uint64(0x94D049BB133111EB)
_SCAN = 1 << 16  # documents looked at together when a token's place is sought
_SHARDS, _DOCUMENTS = 0, 1  # what is permuted, part of the key

Ints = NDArray[np.int64]


class Point(NamedTuple):
    """A place on the epoch's line: a position in the permuted documents, a token in it."""

    position: int
    offset: int


class Permutation:
    """A bijection of 0 .. size-1, keyed by integers.

    Args:
        size: Number of elements.
        key: Non-negative integers below 2**64.
    """

    def __init__(self, size: int, key: Sequence[int]) -> None:
        self.size = size
        self._half = np.uint64(max(1, -(-max(1, size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        packed = b"".join(part.to_bytes(8, "little") for part in key)
        digest = hashlib.blake2b(packed, digest_size=8 * _NUM_ROUNDS).digest()
        self._rounds = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, elements: Ints) -> Ints:
        """Images of ``elements``, int64 of the same shape.

        The network permutes the next power of four above ``size``. An image beyond ``size`` is
        sent through again until it falls below (cycle walking), so the result is a bijection:

            size 5 of 16:  3 -> 11 -> 6 -> 1,  so 3 maps to 1
        """
        images = self._network(elements.astype(np.uint64))
        outside = np.flatnonzero(images >= self.size)
        while len(outside):
            images[outside] = self._network(images[outside])
            outside = outside[images[outside] >= self.size]
        return images.astype(np.int64)

    def _network(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._rounds:
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_A
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_B
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & self._mask)
        return (left << self._half) | right


class EpochOrder:
    """The permuted documents of one epoch. Memory: a few integers per shard.

    Args:
        num_samples: Documents of each shard, int64 [S].
        num_tokens: Tokens of each shard, int64 [S].
        lengths_of: Token counts of a shard's documents, given its number: integers [num_samples].
        seed: Seed of the run.
        epoch: Number of the epoch.
        shuffle_block: Permuted shards whose documents are mixed; 1 keeps documents in the order of
            the tar (it is read straight through).
        shuffle: False keeps shards and documents as they are stored.
    """

    def __init__(
        self,
        num_samples: Ints,
        num_tokens: Ints,
        lengths_of: Callable[[int], NDArray[np.integer[Any]]],
        *,
        seed: int,
        epoch: int,
        shuffle_block: int,
        shuffle: bool = True,
    ) -> None:
        self._lengths_of = lengths_of
        self._key = (seed, epoch)
        self._mixes = shuffle and shuffle_block > 1
        shards = np.arange(len(num_samples), dtype=np.int64)
        if shuffle:
            shards = Permutation(len(shards), (seed, epoch, _SHARDS))(shards)
        self._shards = shards
        edges = np.arange(0, len(shards), shuffle_block)
        self._edges = np.append(edges, len(shards))
        self._first_document = _starts(num_samples[shards])  # of each permuted shard, [S+1]
        self._block_document = self._first_document[self._edges]
        self._block_slot = _starts((num_tokens + num_samples)[shards])[self._edges]
        self.num_documents = int(self._first_document[-1])
        self.num_slots = int(self._block_slot[-1])
        self._permutations: dict[int, Permutation] = {}

    def documents(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Shard and sample numbers of positions first .. first+count-1, cut at the end.

        Returns:
            Two int64 arrays [n], n <= count.
        """
        positions = np.arange(first, min(first + count, self.num_documents), dtype=np.int64)
        if self._mixes:
            blocks = np.searchsorted(self._block_document, positions, side="right") - 1
            for block in np.unique(blocks):
                inside = blocks == block
                start = self._block_document[block]
                permuted = self._permutation(int(block))(positions[inside] - start)
                positions[inside] = permuted + start
        at = np.searchsorted(self._first_document, positions, side="right") - 1
        return self._shards[at], positions - self._first_document[at]

    def _permutation(self, block: int) -> Permutation:
        found = self._permutations.get(block)
        if found is None:
            size = int(self._block_document[block + 1] - self._block_document[block])
            found = Permutation(size, (*self._key, _DOCUMENTS, block))
            if len(self._permutations) >= 64:
                self._permutations.clear()
            self._permutations[block] = found
        return found

    def lengths(self, shards: Ints, samples: Ints) -> Ints:
        """Token counts of documents, int64 [n]; every shard's table is asked once."""
        lengths = np.empty(len(shards), np.int64)
        by_shard = np.argsort(shards, kind="stable")
        names, starts = np.unique(shards[by_shard], return_index=True)
        for shard, group in zip(names, np.split(by_shard, starts[1:]), strict=True):
            lengths[group] = self._lengths_of(int(shard))[samples[group]]
        return lengths

    def points(self, slots: Sequence[int]) -> list[Point]:
        """Where slots of the line lie: a document and a token in it.

        A separator lies at the start of the next document, and the number one past the last slot
        at the end of the line. Time: the documents of the touched blocks, once each; memory: a
        fixed number of them.
        """
        wanted = sorted(set(slots))
        blocks = np.searchsorted(self._block_slot, wanted, side="right") - 1
        found = {self.num_slots: Point(self.num_documents, 0)}
        for block in np.unique(blocks[np.asarray(wanted) < self.num_slots]):
            inside = [s for s, b in zip(wanted, blocks, strict=True) if b == block]
            self._scan(int(block), inside, found)
        return [found[slot] for slot in slots]

    def _scan(self, block: int, slots: Sequence[int], found: dict[int, Point]) -> None:
        position, end = (int(x) for x in self._block_document[block : block + 2])
        start = int(self._block_slot[block])
        left = list(slots)
        while left:
            shards, samples = self.documents(position, min(_SCAN, end - position))
            lengths = self.lengths(shards, samples)
            starts = _starts(lengths + 1) + start
            while left and left[0] < starts[-1]:
                slot = left.pop(0)
                at = int(np.searchsorted(starts, slot, side="right")) - 1
                offset = slot - int(starts[at])
                is_separator = bool(offset == lengths[at])
                found[slot] = Point(position + at + is_separator, 0 if is_separator else offset)
            position, start = position + len(shards), int(starts[-1])


def _starts(counts: Ints) -> Ints:
    """Cumulative sums with a zero in front: [2, 3] -> [0, 2, 5]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def share_of_stream(stream: int, num_streams: int, num_slots: int) -> tuple[int, int]:
    """First and one past the last slot of a stream's part of an epoch's line."""
    return stream * num_slots // num_streams, (stream + 1) * num_slots // num_streams
