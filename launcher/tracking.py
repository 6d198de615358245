"""MLflow: which server, whether it answers, experiments and runs in it."""

from __future__ import annotations

import logging
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import (
    SQLAlchemyError,
)  # MLflow lets it through when a database cannot be opened

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher.artifacts import may_pass

RECIPE_TAG = "haloformer.recipe"
PHASE_TAG = "haloformer.phase"
# MLflow refuses longer parameter values.
PARAM_LIMIT = 6000

_CONNECT_S = 5.0
_GATEWAY_FAULTS = (502, 503, 504)


class TrackingError(ValueError):
    """The tracking server or a run in it cannot be used."""


class TrackingAwayError(TrackingError):
    """The tracking server does not answer now; it may in a while."""


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
        TrackingAwayError: If a server over the network does not answer.
        TrackingError: If the address is wrong, or the database cannot be used.
    """
    if not MLFLOW_HTTP_REQUEST_MAX_RETRIES.is_set():
        # By itself MLflow goes on asking for minutes; we try again where it matters. The ranks
        # inherit it.
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(1)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)  # the report of a run has it
    # At first use MLflow narrates how it creates its tables.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)
    is_server = uri.startswith(("http://", "https://"))
    try:
        if is_server:
            _knock(uri)
        _open_file(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    # MLflow lets SQLAlchemy's through when a database cannot be opened.
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        if not is_server:
            raise TrackingError(
                f"tracking store {uri} cannot be used ({reason}); go to a folder that can be "
                "written, or unset tracking.uri and MLFLOW_TRACKING_URI, or name another store"
            ) from error
        kind = TrackingAwayError if may_pass(error) else TrackingError
        raise kind(
            f"tracking server {uri} does not answer ({reason}); start it, or unset tracking.uri "
            "and MLFLOW_TRACKING_URI to use a database in this folder"
        ) from error
    return client


def _has_no_traceback(record: logging.LogRecord) -> bool:
    """What a database refuses, MLflow logs in a hundred lines and raises as well; one will do."""
    return record.exc_info is None


def _open_file(uri: str) -> None:
    """See that a file of SQLite can be opened: MLflow itself tries ten times, in two minutes."""
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if uri.startswith("sqlite:///") and path.parent.is_dir():  # else MLflow makes the folder
        sqlite3.connect(path).close()


def _knock(uri: str) -> None:
    """See that somebody listens: MLflow itself waits two minutes for a silent host."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_CONNECT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _GATEWAY_FAULTS:
            raise OSError(f"status {error.code} from a gateway") from error
    except urllib.error.URLError as error:
        # MLflow has its own settings for certificates, and will say what it thinks of this one.
        if not isinstance(error.reason, ssl.SSLError):
            raise


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
    """Runs of an experiment, of one recipe or of all, newest first; no phases of runs."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return
    wanted = f"tags.`{RECIPE_TAG}` = '{recipe}'" if recipe is not None else ""
    token = None
    while True:
        page = client.search_runs(
            [found.experiment_id], wanted, order_by=["start_time DESC"], page_token=token
        )
        yield from (run for run in page if PHASE_TAG not in run.data.tags)
        token = page.token
        if not token:
            return


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys such as ``optim.learning_rate``, with their values."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
