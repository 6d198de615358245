"""The threads that make the rows of a batch.

    slots of this rank   0  2  4  6  8        3 workers
    worker               0  1  2  0  1        each makes its slots in order, as a rank does

A slot belongs to one worker for good, with walkers and files of its own, so nothing is shared, and
every number of workers gives the same rows. Threads, not processes: zlib, read and NumPy let go of
the interpreter for half of the time in rows of 4K tokens and three quarters in rows of 64K, so that
two to four threads are of use, and no row is copied from one process to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """Some threads, or with one worker the caller itself.

    Args:
        wanted: As the recipe says; there are never more than slots.
        slots: What is shared out.
    """

    def __init__(self, wanted: int, slots: Sequence[int]) -> None:
        self._slots = slots
        self.num_workers = min(wanted, len(slots))
        # One thread each: a pool of several would give a slot to whoever is free.
        self._threads = [
            ThreadPoolExecutor(1, f"data-{number}")
            for number in range(self.num_workers if self.num_workers > 1 else 0)
        ]

    def slots_of(self, worker: int) -> Sequence[int]:
        """The slots that a worker makes."""
        return self._slots[worker :: self.num_workers]

    def map(self, make: Callable[[int], T]) -> list[T]:
        """What ``make`` gives for every slot, in the order of the slots.

        Raises:
            Exception: What ``make`` raised for the first slot for which it did, after all workers
                have come to rest.
        """
        if not self._threads:
            return [make(slot) for slot in self._slots]
        futures = [
            self._threads[number % self.num_workers].submit(make, slot)
            for number, slot in enumerate(self._slots)
        ]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()
