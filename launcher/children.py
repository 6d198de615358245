"""The phases of a run as MLflow shows them: runs below the run.

run tiny                 all metrics of all steps          RUNNING
  +- narrow   phase 0    those of steps 1 .. 12 again      FINISHED
  +- wide     phase 1    those of steps 13 .. 24 again     RUNNING

A child is found by its tags, never by a note of ours: a process may die between making it and
noting it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Param, Run

from haloformer.launcher.tracking import PHASE_TAG

PARENT_TAG = "mlflow.parentRunId"

_log = logging.getLogger(__name__)


class Children:
    """The children of one run, for the one process that sends for it.

    Args:
        client: Of the server.
        run_id: MLflow's id of the run.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._experiment: str = client.get_run(run_id).info.experiment_id
        self._ids: dict[int, str | None] = {}

    def begin(self, phase: int, name: str, started_ms: int, params: Mapping[str, str]) -> None:
        """Make the child of a phase, if it is not there, and give it its parameters.

        Args:
            phase: Number of the phase.
            name: Of the phase.
            started_ms: When it began, in milliseconds since 1970.
            params: They never change, so telling them twice is harmless.
        """
        child = self._find(phase)
        if child is None:
            tags = {PARENT_TAG: self._run_id, PHASE_TAG: str(phase)}
            child = self._client.create_run(
                self._experiment, start_time=started_ms, run_name=name, tags=tags
            )
        self._ids[phase] = child.info.run_id
        self._client.log_batch(
            child.info.run_id, params=[Param(key, value) for key, value in params.items()]
        )

    def id_of(self, phase: int) -> str | None:
        """MLflow's id of a phase that has begun; None if somebody has deleted its run."""
        if phase not in self._ids:
            child = self._find(phase)
            self._ids[phase] = None if child is None else child.info.run_id
            if child is None:
                _log.warning("phase %d of run %s is gone from MLflow", phase, self._run_id)
        return self._ids[phase]

    def end(self, status: str, ended_ms: int) -> None:
        """End all that go on, as the run itself ends."""
        for child in self._search("attributes.status = 'RUNNING'"):
            self._client.set_terminated(child.info.run_id, status, end_time=ended_ms)

    def _find(self, phase: int) -> Run | None:
        return next(iter(self._search(f"tags.`{PHASE_TAG}` = '{phase}'")), None)

    def _search(self, wanted: str) -> list[Run]:
        mine = f"tags.`{PARENT_TAG}` = '{self._run_id}'"
        return list(self._client.search_runs([self._experiment], f"{mine} and {wanted}"))
