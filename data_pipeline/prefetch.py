"""Batches made ahead in a background thread, as exact as if they were made when asked for.

The state belongs to the batch that was given, not to the one that is being made:

    thread    make 4         make 5         (waits: 2 ahead)       make 6
    ready     [2 3]          [3 4]          [3 4 5] -> give 3      [4 5]
    trainer   uses 1         uses 2         uses 2                 uses 3
    state     after 1        after 2        after 2                after 3
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from haloformer.data_pipeline.blend import Facts

B_co = TypeVar("B_co", covariant=True)
B = TypeVar("B")


class TrainSource(Protocol[B_co]):
    """A stream of training batches without end, whose state is a few integers."""

    @property
    def facts(self) -> Facts:
        """What is known about the data."""

    @property
    def num_skipped(self) -> int:
        """Damaged samples passed over by this rank."""

    def next_batch(self) -> B_co:
        """This rank's part of the next global batch."""

    def state_dict(self) -> dict[str, list[int]]:
        """Where this rank's streams stand; the union over ranks is the state of the run."""

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from the union of all ranks' states; a refused one changes nothing."""

    def identity(self) -> dict[str, str | int]:
        """What a state belongs to."""

    def close(self) -> None:
        """Let go of files and threads; nothing is asked afterwards."""


class _Stand(NamedTuple):
    """Where the stream stands between two batches."""

    state: dict[str, list[int]]
    num_skipped: int


def _stand(stream: TrainSource[object]) -> _Stand:
    return _Stand(stream.state_dict(), stream.num_skipped)


class _Maker(Generic[B]):
    """The thread's side. It knows no ``Prefetcher``, so that one can be collected while it runs."""

    def __init__(self, stream: TrainSource[B], depth: int) -> None:
        self.stream, self._depth = stream, depth
        self._ready: deque[tuple[B, _Stand] | BaseException] = deque()
        self._changed = threading.Condition()
        self._halting = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on making batches."""
        if self._thread is None:
            # A daemon, because Python waits for other threads before it runs exit handlers, and
            # an exit handler is what ends this one.
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def halt(self) -> None:
        """End the thread after the batch it is making; what is ready stays."""
        if self._thread is None:
            return
        with self._changed:
            self._halting = True
            self._changed.notify_all()
        if self._thread is threading.current_thread():
            return  # the collector ran here; nobody holds this any more, and the thread ends
        self._thread.join()
        self._thread, self._halting = None, False

    def clear(self) -> None:
        """Throw away what is ready."""
        assert self._thread is None
        self._ready.clear()

    def take(self) -> tuple[B, _Stand]:
        """The oldest batch that is ready, or the error in its place, which stays there."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            oldest = self._ready[0]
            if isinstance(oldest, BaseException):
                raise oldest
            self._ready.popleft()
            self._changed.notify_all()
        return oldest

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._halting or self._has_room)
                if self._halting:
                    return
            made: tuple[B, _Stand] | BaseException
            try:
                made = self.stream.next_batch(), _stand(self.stream)
            except BaseException as error:  # whatever it is, a trainer may be waiting for it
                made = error
            with self._changed:
                self._ready.append(made)
                self._changed.notify_all()

    @property
    def _has_room(self) -> bool:
        # Behind an error there is nothing to make.
        failed = bool(self._ready) and isinstance(self._ready[-1], BaseException)
        return len(self._ready) < self._depth and not failed


class Prefetcher(Generic[B]):
    """A stream whose next batches are made while the last one is used.

    Everything it says is as of the last batch given: ``state_dict`` and ``num_skipped`` are those
    of the bare stream after the same number of batches. The thread starts with the first batch.

    Args:
        stream: What is read; nobody else may use it from now on.
        depth: Batches made ahead at most, at least 1.
    """

    def __init__(self, stream: TrainSource[B], depth: int) -> None:
        assert depth >= 1, depth
        self._maker = _Maker(stream, depth)
        self._given = _stand(stream)
        # Also when this is collected, and before the interpreter ends.
        self._halt = weakref.finalize(self, self._maker.halt)

    @property
    def facts(self) -> Facts:
        """What is known about the data."""
        return self._maker.stream.facts

    @property
    def num_skipped(self) -> int:
        """Damaged samples passed over up to the last batch given."""
        return self._given.num_skipped

    def next_batch(self) -> B:
        """This rank's part of the next global batch; waits where it is not ready.

        Raises:
            Exception: What the stream raised when it made this batch; again at every call, until
                another state is loaded.
        """
        assert self._halt.alive, "a closed stream is asked for a batch"
        self._maker.start()
        batch, self._given = self._maker.take()
        return batch

    def state_dict(self) -> dict[str, list[int]]:
        """The state after the last batch given, whatever was made since."""
        return self._given.state

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        """Continue from the union of all ranks' states.

        Raises:
            DataError: As the stream does; nothing is changed then.
        """
        self._maker.halt()
        self._maker.stream.load_state(state)
        self._maker.clear()
        self._given = _stand(self._maker.stream)

    def identity(self) -> dict[str, str | int]:
        """What a state belongs to."""
        return self._maker.stream.identity()

    def close(self) -> None:
        """End the thread, also when it waits for room, and close the stream."""
        self._halt()
        self._maker.clear()
        self._maker.stream.close()
