"""Sends what a run has spooled to MLflow: in order, each record once, never in training's way."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from dataclasses import replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from haloformer.launcher import tracking
from haloformer.launcher.artifacts import ArtifactFolder, may_pass
from haloformer.launcher.children import Children
from haloformer.launcher.known_runs import create_run, read_known
from haloformer.launcher.spool import Record, Spool

_log = logging.getLogger(__name__)

_RECORDS_AT_A_TIME = 50
# MLflow takes no more in one request.
_METRICS_AT_A_TIME, _PARAMS_AT_A_TIME = 1000, 100
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_LOOK_AGAIN_S = 0.5

# MLflow's database errors arrive as its own exception, artifacts' as OSError.
FAULTS = (tracking.TrackingAwayError, MlflowException, OSError)


class Sender:
    """Delivers the spool of one run.

    Args:
        spool: Of the run; the caller holds ``spool.sending``.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._artifacts: ArtifactFolder | None = None
        self._children: Children | None = None

    def send_next(self) -> int:
        """Deliver the next few records; how many, 0 when all are delivered.

        Raises:
            TrackingAwayError: If the server cannot be reached.
            MlflowException: If it does not take them.
            OSError: If the store of artifacts does not take one.
        """
        records = self._spool.pending(_RECORDS_AT_A_TIME)
        if not records:
            return 0
        client = self.connect()
        batch = list(takewhile(lambda record: "metrics" in record.content, records))
        if batch:
            self._send_metrics(client, batch)
        else:
            batch = records[:1]
            self._send_other(client, batch[0])
        self._spool.mark(batch[-1].end)
        return len(batch)

    def send_all(self) -> int:
        """Deliver all records; how many. Raises as ``send_next``."""
        total = 0
        while sent := self.send_next():
            total += sent
        return total

    @property
    def run_id(self) -> str:
        """MLflow's id of the run, once something was sent."""
        return self._run_id

    def connect(self) -> MlflowClient:
        """A client that knows the run; one that began without a server is made now.

        Raises:
            TrackingAwayError: If the server cannot be reached.
        """
        if self._client is not None:
            return self._client
        known = read_known(self._spool.folder)
        assert known is not None, "a run that is spooled is known"
        client = tracking.connect(known.tracking_uri)
        if known.mlflow_id is None:
            known = replace(known, mlflow_id=create_run(client, known).info.run_id)
            known.save(self._spool.folder)
        assert known.mlflow_id is not None
        self._client, self._run_id = client, known.mlflow_id
        return client

    def _send_metrics(self, client: MlflowClient, batch: list[Record]) -> None:
        """All to the run, and those of a phase to its child."""
        targets: dict[str, list[Metric]] = defaultdict(list)
        for record in batch:
            content = record.content
            metrics = [
                Metric(key, value, content["time"], content["step"])
                for key, value in content["metrics"].items()
            ]
            targets[self._run_id] += metrics
            if "phase" in content:
                child = self._children_of(client).id_of(content["phase"])
                if child is not None:
                    targets[child] += metrics
        for run_id, metrics in targets.items():
            for start in range(0, len(metrics), _METRICS_AT_A_TIME):
                client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_A_TIME])

    def _send_other(self, client: MlflowClient, record: Record) -> None:
        content = record.content
        if "name" in content:
            self._children_of(client).begin(
                content["phase"], content["name"], content["time"], content["params"]
            )
        elif "params" in content:
            params = [Param(key, value) for key, value in content["params"].items()]
            for start in range(0, len(params), _PARAMS_AT_A_TIME):
                client.log_batch(self._run_id, params=params[start : start + _PARAMS_AT_A_TIME])
        elif "tags" in content:
            tags = [RunTag(key, value) for key, value in content["tags"].items()]
            client.log_batch(self._run_id, tags=tags)
        elif "artifact" in content:
            self._send_artifact(client, content["artifact"], content["folder"])
        else:
            self._send_status(client, content)

    def _send_status(self, client: MlflowClient, content: dict[str, Any]) -> None:
        run_id: str | None = self._run_id
        status, ended = content["status"], content["time"]
        if "phase" in content:
            run_id = self._children_of(client).id_of(content["phase"])
        if run_id is None:
            return
        if status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
            return
        client.set_terminated(run_id, status, end_time=ended)
        if "phase" not in content:
            self._children_of(client).end(status, ended)

    def _children_of(self, client: MlflowClient) -> Children:
        if self._children is None:
            self._children = Children(client, self._run_id)
        return self._children

    def _send_artifact(self, client: MlflowClient, name: str, folder: str) -> None:
        path = self._spool.folder / name
        if not path.is_file():  # somebody tidied up
            _log.warning("%s is gone and is missing from run %s", path, self._run_id)
            return
        if self._artifacts is None:
            self._artifacts = ArtifactFolder.of_run(client, self._run_id)
        if self._artifacts.local_path(str(PurePosixPath(folder, path.name))) != path:
            self._artifacts.upload(path, folder)


class BackgroundSender:
    """Sends in a thread, for as long as a run goes; while the server is away it tries again.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._spool = Spool(folder)
        self._ending = threading.Event()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something new."""
        self._news.set()

    def finish(self, patience_s: float) -> None:
        """Send what is left, if that works; wait so long at most."""
        self._ending.set()
        self._news.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        while True:
            ending = self._ending.is_set()  # before looking: there is always a look after the end
            with self._spool.sending() as mine:
                if mine:
                    self._send()
                    return
            if ending:
                return
            # The process that sent for this run before is still on its way out.
            self._news.wait(_LOOK_AGAIN_S)
            self._news.clear()

    def _send(self) -> None:
        sender, wait, away = Sender(self._spool), _FIRST_WAIT_S, False
        while True:
            ending = self._ending.is_set()  # before looking: what came before it is sent
            try:
                sent = sender.send_next()
            except tracking.TrackingError as error:
                if not isinstance(error, tracking.TrackingAwayError):
                    _log.warning("%s; nothing is sent", error)
                    return
                fault: Exception = error
            except FAULTS as error:
                fault = error
                if not may_pass(error):
                    _log.warning("MLflow refuses records of this run (%s)", _one_line(error))
                    return
            else:
                if away and sent:
                    _log.warning("the tracking server is back; what it missed is being sent")
                    wait, away = _FIRST_WAIT_S, False
                if sent == 0:
                    if ending:
                        return
                    self._news.wait(_LOOK_AGAIN_S)
                    self._news.clear()
                continue
            if ending:
                return
            if not away:
                _log.warning(
                    "the tracking server is away (%s); training goes on, metrics are kept in %s",
                    _one_line(fault),
                    self._spool.folder,
                )
            away = True
            self._ending.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
