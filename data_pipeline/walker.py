"""One logical stream: walks its share of each epoch's line, epoch after epoch.

    2 streams, epoch 0:  A A A A / B | B B / C C /      stream 0: A and the first of B
               epoch 1:  C C / B B B | / A A A A /      stream 0 goes on with C and B

The state is four integers; everything else here can be computed again from them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.order import EpochOrder, Point, share_of_stream
from haloformer.data_pipeline.packing import Piece, Span
from haloformer.data_pipeline.reader import ShardReader

_WINDOW = 256  # documents whose place is computed together
_MAX_EPOCHS = 8  # epochs kept in memory; shares are even, so streams are in one or two


class Cursor(NamedTuple):
    """Where a stream stands: the next token, and the number of its next sequence."""

    epoch: int
    position: int
    offset: int
    sequence: int


class Epochs:
    """The orders of the epochs that are being read, and the shares of some streams in them.

    Args:
        reader: The data set.
        seed: Seed of the run.
        shuffle_block: See ``EpochOrder``.
        num_streams: Logical streams in all.
        streams: Those whose shares are asked.
        shuffle: False keeps the stored order.

    Raises:
        DataError: If some stream would own no token.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        seed: int,
        shuffle_block: int,
        num_streams: int,
        streams: Sequence[int],
        shuffle: bool = True,
    ) -> None:
        index = reader.index
        # Two neighbouring slots hold at least one token.
        if index.num_tokens + index.num_samples < 2 * num_streams:
            raise DataError(
                f"{index.num_tokens} tokens cannot feed {num_streams} sequences per step",
                file=index.folder,
                remedy="lower batch.global_batch or prepare more text",
            )
        self._reader = reader
        self._seed, self._shuffle_block, self._shuffle = seed, shuffle_block, shuffle
        self._num_streams, self._streams = num_streams, streams
        self._num_samples = np.array([s.num_samples for s in index.shards], np.int64)
        self._num_tokens = np.array([s.num_tokens for s in index.shards], np.int64)
        self._open: OrderedDict[int, tuple[EpochOrder, dict[int, tuple[Point, Point]]]] = (
            OrderedDict()
        )

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        return self._entry(epoch)[0]

    def share(self, epoch: int, stream: int) -> tuple[Point, Point]:
        """First and one past the last point of a stream's share of an epoch."""
        return self._entry(epoch)[1][stream]

    def _entry(self, epoch: int) -> tuple[EpochOrder, dict[int, tuple[Point, Point]]]:
        entry = self._open.get(epoch)
        if entry is None:
            entry = self._open[epoch] = self._build(epoch)
            while len(self._open) > _MAX_EPOCHS:
                self._open.popitem(last=False)
        self._open.move_to_end(epoch)
        return entry

    def _build(self, epoch: int) -> tuple[EpochOrder, dict[int, tuple[Point, Point]]]:
        order = EpochOrder(
            self._num_samples,
            self._num_tokens,
            self._reader.lengths,
            seed=self._seed,
            epoch=epoch,
            shuffle_block=self._shuffle_block,
            shuffle=self._shuffle,
        )
        cuts = [share_of_stream(s, self._num_streams, order.num_slots) for s in self._streams]
        # All cuts in one call: a block of shards is scanned once, not once per stream.
        points = order.points([slot for cut in cuts for slot in cut])
        shares = dict(zip(self._streams, zip(points[::2], points[1::2], strict=True), strict=True))
        return order, shares


class Walker:
    """Gives the text of one stream, piece by piece.

    Args:
        epochs: Orders and shares.
        reader: The data set.
        stream: Number of the stream.
        skip_corrupt: Pass over damaged documents and count them; or they are given like others.
        num_epochs: Stop after so many; None goes on for ever.
    """

    def __init__(
        self,
        epochs: Epochs,
        reader: ShardReader,
        stream: int,
        *,
        skip_corrupt: bool,
        num_epochs: int | None = None,
    ) -> None:
        self.num_skipped = 0
        self._epochs, self._reader, self._stream = epochs, reader, stream
        self._skip_corrupt, self._num_epochs = skip_corrupt, num_epochs
        self._sequence = 0
        self._epoch = 0
        self._at = self._stop = Point(0, 0)
        self._window_start = 0
        self._window: list[tuple[int, int, int]] = []
        self._enter(0)

    @property
    def cursor(self) -> Cursor:
        """The state, exact between two calls."""
        return Cursor(self._epoch, self._at.position, self._at.offset, self._sequence)

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        """Go to a state.

        Raises:
            DataError: If it does not lie in the share of this stream.
        """
        whole = all(type(part) is int and part >= 0 for part in cursor)
        if whole:
            self._enter(cursor.epoch)
            at = Point(cursor.position, cursor.offset)
            whole = self._at <= at <= self._stop
            if whole and at < self._stop:
                whole = at.offset < self._document(at.position)[2]
        if not whole:
            raise DataError(
                f"state {tuple(cursor)} lies outside stream {self._stream}",
                file=self._reader.index.folder,
                remedy="it belongs to another data set, seed, shuffle_block or global_batch",
            )
        self._at, self._sequence = at, cursor.sequence

    def next_sequence(self) -> None:
        """Count a finished sequence."""
        self._sequence += 1

    def take(self, room: int) -> Piece | None:
        """The next piece of at most ``room`` tokens; None after the last epoch.

        Raises:
            DataError: If all of the share is damaged, and damage is skipped.
        """
        num_turns = 0
        while True:
            if self._at == self._stop:
                if self._epoch + 1 == self._num_epochs:
                    return None
                num_turns += 1
                if num_turns > 2:
                    raise DataError(
                        f"every document of stream {self._stream} is damaged",
                        file=self._reader.index.folder,
                        remedy="restore the shards from a copy or prepare the data again",
                    )
                self._enter(self._epoch + 1)
            position, offset = self._at
            shard, sample, length = self._document(position)
            ends_here = position == self._stop.position
            end = self._stop.offset if ends_here else length
            after = self._stop if ends_here else Point(position + 1, 0)
            # Whoever stops at damage finds it in reading, which may be another rank's.
            if self._skip_corrupt and not self._is_sound(shard, sample):
                self.num_skipped += 1
                self._at = after
                continue
            stop = min(offset + room, end)
            self._at = after if stop == end else Point(position, stop)
            return Piece(Span(self._epoch, shard, sample, offset, stop), stop == end)

    def _is_sound(self, shard: int, sample: int) -> bool:
        try:
            self._reader.check(shard, sample)
        except CorruptSampleError:
            return False
        return True

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        self._at, self._stop = self._epochs.share(epoch, self._stream)
        self._window = []

    def _document(self, position: int) -> tuple[int, int, int]:
        """Shard, sample and token count of the document at a position."""
        at = position - self._window_start
        if not 0 <= at < len(self._window):
            order = self._epochs.order(self._epoch)
            shards, samples = order.documents(position, _WINDOW)
            lengths = order.lengths(shards, samples)
            self._window = list(
                zip(shards.tolist(), samples.tolist(), lengths.tolist(), strict=True)
            )
            self._window_start, at = position, 0
        return self._window[at]
