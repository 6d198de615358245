"""What a person sees of a run: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


@contextlib.contextmanager
def to_whoever_reads() -> Iterator[None]:
    """Around writing to stdout, which may fail: a run outlives the one who reads it.

    A terminal that is closed asks a run to stop with a checkpoint, and must not end it before it
    has. From then on what is said goes nowhere.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPIPE):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class StepProgress:
    """Shows the steps of a run; use as a context manager on one rank only.

    Args:
        total: Steps of the whole run.
        done: Steps behind us when this start began.
        every: Print every so many steps when there is no terminal.
    """

    def __init__(self, total: int, done: int, every: int) -> None:
        self._total, self._every = total, every
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                # Where the terminal is narrow this is cut, not the number of the step.
                TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True)),
                TimeRemainingColumn(),
                console=Console(),
                expand=True,
            )
            self._task = self._bar.add_task("step", total=total, completed=done, status="starting")

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with to_whoever_reads():
                self._bar.stop()

    def step(self, done: int, values: dict[str, float]) -> None:
        """Show a finished step."""
        bits = f"bits/char {values['bits_per_char']:.3f}  " if "bits_per_char" in values else ""
        status = (
            f"loss {values['loss']:.4f}  {bits}"
            f"grad {values['grad_norm']:.2f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tok/s"
        )
        if values.get("cut_sources", 0.0) + values.get("cut_targets", 0.0) > 0.0:
            cut = (f"{values[f'cut_{name}']:.0f} {name}" for name in ("sources", "targets"))
            status += f"  cut: {', '.join(cut)}"
        if values.get("num_skipped", 0.0) > 0.0:
            status += f"  skipped: {values['num_skipped']:.0f} damaged"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif done % self._every == 0 or done == self._total:
            with to_whoever_reads():
                print(f"step {done}/{self._total}  {status}", flush=True)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        with to_whoever_reads():
            if self._bar is not None:
                self._bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, flush=True)
