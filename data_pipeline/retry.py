"""Try again what a network may spoil: a few times, each wait longer than the one before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and how long between.

    With the defaults the waits add up to about a minute, which a server's restart may take:

        try  0.5 s  try  1 s  try  2 s  try  4 s  try  8 s  try  16 s  try  30 s  try   error

    Attributes:
        attempts: Tries in all, at least one.
        first_wait_s: Wait after the first failure; it doubles from then on.
        longest_wait_s: No wait is longer.
    """

    attempts: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def waits(self) -> Iterator[float]:
        """Seconds to wait after each failure but the last."""
        for number in range(self.attempts - 1):
            wait = min(self.first_wait_s * 2.0**number, self.longest_wait_s)
            # Ranks that failed together must not come back together.
            yield wait * random.uniform(0.75, 1.0)

    def call(
        self,
        work: Callable[[], Result],
        faults: tuple[type[Exception], ...],
        passes: Callable[[Exception], bool],
    ) -> Result:
        """The result of ``work``; the last of its faults when no attempt succeeded.

        Args:
            work: What is tried; it must be harmless to do it twice.
            faults: Exceptions that may be of the network; others are not caught.
            passes: Says of such a fault whether it may be gone a little later.
        """
        for wait in self.waits():
            try:
                return work()
            except faults as fault:
                if not passes(fault):
                    raise
            time.sleep(wait)
        return work()
