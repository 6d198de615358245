"""MLflow: where runs live, and what the ranks tell it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.async_logging.run_operations import RunOperations

from haloformer.configs.schema import TrackingConfig, TrainConfig

_log = logging.getLogger(__name__)

# MLflow refuses longer parameter values.
_PARAM_LIMIT = 6000


class TrackingError(ValueError):
    """The tracking server or a run in it cannot be used."""


def tracking_uri(config: TrackingConfig, environment: str | None) -> str:
    """The recipe's address, else MLFLOW_TRACKING_URI's, else a database in this folder.

    Args:
        config: The recipe's section.
        environment: Value of MLFLOW_TRACKING_URI.
    """
    return config.uri or environment or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect(uri: str) -> MlflowClient:
    """A client, after asking the server one question.

    Raises:
        TrackingError: If the server does not answer.
    """
    # At first use MLflow narrates how it creates its tables.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrackingError(
            f"tracking server {uri} does not answer ({reason}); start it, or unset tracking.uri "
            "and MLFLOW_TRACKING_URI to use a database in this folder"
        ) from error
    return client


def experiment_of(client: MlflowClient, config: TrackingConfig) -> Experiment:
    """The experiment of the recipe, created at first use.

    With an embedded database the artifacts go to a folder beside it, by absolute path: a relative
    one would follow whoever opens the database.
    """
    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return found
    location = config.artifacts
    if location is None and client.tracking_uri.startswith("sqlite:"):
        location = str(Path("mlruns").resolve())
    # Without the tag MLflow 3 files training runs under its pages for language-model evaluation.
    client.create_experiment(
        config.experiment,
        artifact_location=location,
        tags={"mlflow.experimentKind": "custom_model_development"},
    )
    created = client.get_experiment_by_name(config.experiment)
    assert created is not None
    return created


def create_run(client: MlflowClient, experiment: Experiment, config: TrainConfig) -> Run:
    """A new run, with every key of the recipe as a searchable parameter."""
    run = client.create_run(experiment.experiment_id, run_name=config.name)
    params = [
        Param(key, str(value)[:_PARAM_LIMIT])
        for key, value in flatten(config.model_dump(mode="json"))
    ]
    tags = [RunTag("haloformer.recipe", config.name)]
    client.log_batch(run.info.run_id, params=params, tags=tags)
    return run


def find_run(client: MlflowClient, run_id: str) -> Run:
    """A run by id.

    Raises:
        TrackingError: If there is none.
    """
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(
            f"run {run_id}: not found at {client.tracking_uri}; "
            "'haloformer checkpoints latest' shows the newest"
        ) from error


def runs_newest_first(client: MlflowClient, experiment: str, recipe: str | None) -> Iterator[Run]:
    """Runs of an experiment, of one recipe or of all, newest first."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return
    wanted = f"tags.`haloformer.recipe` = '{recipe}'" if recipe is not None else ""
    token = None
    while True:
        page = client.search_runs(
            [found.experiment_id], wanted, order_by=["start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


class Tracker:
    """Metrics of a run, sent by rank 0 without waiting for the server."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._last: RunOperations | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send metrics of one step."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self._last = self._client.log_batch(self._run_id, metrics=metrics, synchronous=False)

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._client.set_tag(self._run_id, key, value)

    def close(self, status: str) -> None:
        """Send what is left and end the run: FINISHED, FAILED or KILLED."""
        if self._last is not None:
            try:
                self._last.wait()  # batches are sent in order: after the last, all are there
            except MlflowException as error:
                _log.warning("metrics may be missing from run %s: %s", self._run_id, error)
        self._client.set_terminated(self._run_id, status)


def reopen_run(client: MlflowClient, run_id: str) -> None:
    """Mark an ended run as running again."""
    client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
