"""Counts for a person; progress is on stderr, for the results of a command may go to stdout."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def counted(number: int, thing: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


class CountProgress:
    """A bar on a terminal, a plain line now and then in a pipe; use as a context manager.

    Args:
        what: Counted things, in the plural.
        total: How many there are.
        every: Print every so many when there is no terminal.
    """

    def __init__(self, what: str, total: int, every: int) -> None:
        self._what, self._total, self._every = what, total, every
        self._said = 0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> CountProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int) -> None:
        """Say that so many are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif done // self._every > self._said // self._every or done == self._total:
            self._said = done
            print(f"{done}/{self._total} {self._what}", file=sys.stderr, flush=True)
