"""What rank 0 tells MLflow while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from haloformer.configs.schema import Phase
from haloformer.launcher.known_runs import read_known
from haloformer.launcher.sender import BackgroundSender
from haloformer.launcher.spool import Spool, Status
from haloformer.launcher.system_metrics import SystemSampler
from haloformer.launcher.tracking import PARAM_LIMIT

# At the end of a run, for the records that are still on their way.
_PATIENCE_S = 15.0
# A continuation on another layout gives the same losses to rounding noise.
_SAME = 1e-5


class Tracker:
    """Writes metrics to the run's spool and has them sent in the background.

    A run that goes on from a checkpoint trains some steps again that it has told of before it
    died; with the same losses they are not told twice.

    Args:
        folder: Of the run.
        resume_step: Step of the checkpoint that the run goes on from; None for a fresh start.
        phases: Of a run that has several; each is a run below the run.
    """

    def __init__(self, folder: Path, resume_step: int | None, phases: Sequence[Phase] = ()) -> None:
        known = read_known(folder)
        assert known is not None, "the launcher writes it before any rank starts"
        self._spool, self._phases = Spool(folder), phases
        # A supervised run that died before its first checkpoint starts afresh and has told, too.
        self._told = self._spool.metrics_after(-1 if resume_step is None else resume_step)
        if self._told or resume_step is not None:
            self._spool.add_status("RUNNING")
            self._end_phases_before(0 if resume_step is None else resume_step)
        self._sender = BackgroundSender(folder)
        self._sampler = SystemSampler(self._spool.add_metrics, known.started_ms)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Tell the metrics of one step; never waits for the server."""
        if not self._told_before(step, values):
            self._spool.add_metrics(step, values, self._phase_of(step))
            self._sender.wake()

    def begin_phase(self, phase: Phase) -> None:
        """Tell that a phase begins, or goes on."""
        state = self._spool.phase_states().get(phase.number)
        if state is None:
            params = {key: str(value)[:PARAM_LIMIT] for key, value in phase.settings().items()}
            self._spool.add_phase(phase.number, phase.name, params)
        elif state != "RUNNING":
            self._spool.add_status("RUNNING", phase.number)

    def end_phase(self, phase: Phase) -> None:
        """Tell that a phase is done."""
        if self._phases:
            self._spool.add_status("FINISHED", phase.number)

    def close(self, status: Status) -> None:
        """Say how the run ended, and wait a little for the server to have all."""
        self._sampler.stop()
        self._spool.add_status(status)
        self._sender.finish(_PATIENCE_S)

    def _end_phases_before(self, step: int) -> None:
        """Tell of phases whose end a process did not live to tell."""
        states = self._spool.phase_states()
        for phase in self._phases:
            if phase.end_step <= step and states.get(phase.number, "FINISHED") != "FINISHED":
                self.end_phase(phase)

    def _phase_of(self, step: int) -> int | None:
        """The phase of the step that ends as number ``step``; step 0 is before the first."""
        return next((phase.number for phase in self._phases if step <= phase.end_step), None)

    def _told_before(self, step: int, values: dict[str, float]) -> bool:
        told = self._told.get(step, {})
        return all(
            key in told
            and (not key.endswith("loss") or math.isclose(told[key], value, rel_tol=_SAME))
            for key, value in values.items()
        )
