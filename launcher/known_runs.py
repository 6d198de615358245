"""Runs and where their artifacts are: as MLflow knows them, or as their own folders do.

A run that starts while the server is away has an id of its own and keeps its artifacts in its
folder. When the server is back it becomes an MLflow run, once, with a tag that holds that id.

    runs/<id>/run.json      what is known of the run
              spool.jsonl   what MLflow is told, see spool.py
              artifacts/    of a run that began without a server
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher import tracking
from haloformer.launcher.artifacts import ArtifactFolder, may_pass
from haloformer.launcher.run_dir import write_json_atomically

RUNS = Path("runs")
LOCAL_ID_TAG = "haloformer.local_id"
_FILE = "run.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownRun:
    """What has to be known of a run to find its checkpoints and to tell MLflow about it.

    Attributes:
        run_id: Of its folder; MLflow's id, or its own if it began without a server.
        tracking_uri: MLflow's server or database.
        experiment: Name.
        recipe: Name.
        started_ms: Milliseconds since 1970.
        artifact_uri: Where its checkpoints are.
        mlflow_id: None until the server has heard of it.
        location: Of the experiment's artifacts, should it have to be made.
    """

    run_id: str
    tracking_uri: str
    experiment: str
    recipe: str
    started_ms: int
    artifact_uri: str
    mlflow_id: str | None
    location: str | None = None

    @property
    def began_without_server(self) -> bool:
        """Whether its artifacts are in its folder, for a server that has to get copies."""
        return self.run_id != self.mlflow_id

    def artifacts(self) -> ArtifactFolder:
        """Its artifacts; nothing is asked."""
        return ArtifactFolder(self.artifact_uri, self.tracking_uri)

    def save(self, folder: Path) -> None:
        """Write it into the folder of the run."""
        write_json_atomically(folder / _FILE, asdict(self))


def read_known(folder: Path) -> KnownRun | None:
    """What the folder of a run says of it, None if it says nothing."""
    try:
        return KnownRun(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None


def start_run(
    client: MlflowClient | None, uri: str, config: TrackingConfig, recipe: str, runs: Path
) -> KnownRun:
    """A new run, and its folder.

    Args:
        client: Of the server; None while it is away.
        uri: Its address.
        config: The recipe's section.
        recipe: Name of the recipe.
        runs: Where the folders of runs are.
    """
    known = KnownRun(
        run_id=uuid.uuid4().hex,
        tracking_uri=uri,
        experiment=config.experiment,
        recipe=recipe,
        started_ms=int(time.time() * 1000),
        artifact_uri="",
        mlflow_id=None,
        location=config.artifacts,
    )
    info = None
    try:
        info = None if client is None else create_run(client, known).info
    except MlflowException as error:
        if not may_pass(error):
            raise
        # Gone just now. Should it have made the run all the same, the tag will tell.
        _log.warning("%s; training starts without the server", " ".join(str(error).split())[:200])
    if info is None:
        folder = (runs / known.run_id).resolve()
        (folder / "artifacts").mkdir(parents=True)
        known = replace(known, artifact_uri=str(folder / "artifacts"))
    else:
        known = replace(
            known, run_id=info.run_id, mlflow_id=info.run_id, artifact_uri=info.artifact_uri
        )
        folder = (runs / known.run_id).resolve()
        folder.mkdir(parents=True)
    known.save(folder)
    return known


def create_run(client: MlflowClient, known: KnownRun) -> Run:
    """The MLflow run of a run that the server has not heard of, made at most once.

    A process may have died between making it and noting it: its tag tells.
    """
    wanted = TrackingConfig(experiment=known.experiment, artifacts=known.location)
    experiment = tracking.experiment_of(client, wanted)
    tag = f"tags.`{LOCAL_ID_TAG}` = '{known.run_id}'"
    for found in client.search_runs([experiment.experiment_id], tag, max_results=1):
        return found
    return client.create_run(
        experiment.experiment_id,
        start_time=known.started_ms,
        run_name=known.recipe,
        tags={LOCAL_ID_TAG: known.run_id, tracking.RECIPE_TAG: known.recipe},
    )


def find_runs(
    wanted: str, config: TrackingConfig, uri: str, recipe: str | None = None, runs: Path = RUNS
) -> Iterator[KnownRun]:
    """The run of an id; or for ``latest`` all of an experiment, newest first.

    The folder of a run is asked first, so that the server may be away.

    Args:
        wanted: An id (MLflow's, or the one of a run that began without a server) or ``latest``.
        config: Names the experiment.
        uri: Address of the server.
        recipe: Only runs of this recipe.
        runs: Where the folders of runs are.

    Raises:
        TrackingError: If the server is asked and does not know the id.
    """
    if wanted != "latest":
        known = read_known(runs / wanted) if wanted == Path(wanted).name else None
        yield known or _of_mlflow(tracking.find_run(tracking.connect(uri), wanted), config, uri)
        return
    local = [
        known
        for folder in (runs.iterdir() if runs.is_dir() else ())
        if (known := read_known(folder)) is not None
        and (known.tracking_uri, known.experiment) == (uri, config.experiment)
        and recipe in (None, known.recipe)
    ]
    local.sort(key=lambda known: known.started_ms)
    try:
        client = tracking.connect(uri)
    except tracking.TrackingAwayError as error:
        _log.warning("%s; looking into %s instead", error, runs.resolve())
        yield from reversed(local)
        return
    by_id = {known.mlflow_id: known for known in local}
    unknown = [known for known in local if known.mlflow_id is None]
    for run in tracking.runs_newest_first(client, config.experiment, recipe):
        while unknown and unknown[-1].started_ms > run.info.start_time:
            yield unknown.pop()
        yield by_id.get(run.info.run_id) or _of_mlflow(run, config, uri)
    yield from reversed(unknown)


def find_run(wanted: str, experiment: str) -> KnownRun:
    """The run that a command names, at the server that the environment names.

    Args:
        wanted: As for ``find_runs``.
        experiment: Where ``latest`` is looked for.

    Raises:
        TrackingError: If there is none.
    """
    uri = tracking.tracking_uri(TrackingConfig(), os.environ.get("MLFLOW_TRACKING_URI"))
    known = next(find_runs(wanted, TrackingConfig(experiment=experiment), uri), None)
    if known is None:
        raise tracking.TrackingError(
            f"no run in experiment {experiment} at {uri}; train one first, or name another with "
            "--experiment"
        )
    return known


def _of_mlflow(run: Run, config: TrackingConfig, uri: str) -> KnownRun:
    return KnownRun(
        run_id=run.info.run_id,
        tracking_uri=uri,
        experiment=config.experiment,
        recipe=run.data.tags.get(tracking.RECIPE_TAG, run.info.run_name),
        started_ms=run.info.start_time,
        artifact_uri=run.info.artifact_uri,
        mlflow_id=run.info.run_id,
    )
