"""A rank's side of being watched: it beats, and looks for orders meanwhile."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

from haloformer.launcher.run_dir import Beat, RunDir

BEAT_S = 1.0


class Pulse:
    """A thread that goes on beating while the rank waits in a collective or computes.

    So beats tell that a process and its host live; the step in them tells whether the run moves.
    A rank whose attempt is over ends itself, wherever it hangs: its host may have been cut off
    when the others were ended, and must not write into the run that went on without it.
    """

    def __init__(
        self, run_dir: RunDir, rank: int, attempt: str, ask_stop: Callable[[], None]
    ) -> None:
        """Prepare.

        Args:
            run_dir: Of the run.
            rank: Whose pulse.
            attempt: The start of the ranks that it belongs to.
            ask_stop: Called when the launcher wants the rank to stop.
        """
        self._run_dir, self._rank, self._attempt = run_dir, rank, attempt
        self._ask_stop = ask_stop
        self._count = 0
        self._step = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="pulse", daemon=True)

    def start(self) -> None:
        """Announce the rank and begin to beat; a rank that comes too late ends here."""
        self._obey()  # or it would take the place of the rank that came after it
        self._run_dir.announce_rank(self._rank)
        self._obey()
        self._beat(None)
        self._thread.start()

    def at_step(self, step: int) -> None:
        """Say how many steps are done."""
        self._step = step

    def end(self, code: int) -> None:
        """The last beat, with the exit code."""
        self._over.set()
        self._thread.join()
        self._beat(code)

    def _go_on(self) -> None:
        while not self._over.wait(BEAT_S):
            self._obey()
            self._beat(None)

    def _obey(self) -> None:
        # A filesystem that is away for a while is no reason to end.
        with contextlib.suppress(OSError):
            orders = self._run_dir.read_orders()
            if orders is None:
                return
            if orders.attempt != self._attempt:
                with contextlib.suppress(OSError):  # who would read it may be gone as well
                    said = f"rank {self._rank}: this start of the run is over"
                    print(said, file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may hang in a collective
            if orders.stop:
                self._ask_stop()

    def _beat(self, code: int | None) -> None:
        self._count += 1
        with contextlib.suppress(OSError):
            self._run_dir.write_beat(self._rank, Beat(self._attempt, self._count, self._step, code))
