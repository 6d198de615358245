"""The artifacts of one MLflow run: a folder on this machine, or behind a server or object store.

What a network may spoil is tried again for a quarter of a minute; then it is an ``OSError`` or
MLflow's own exception, for the caller to judge.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from haloformer.data_pipeline.retry import RetryPolicy

Result = TypeVar("Result")

_TOO_MANY = 429
_POLICY = RetryPolicy(attempts=5, first_wait_s=1.0, longest_wait_s=8.0)


class ArtifactFolder:
    """Files by name below the artifact folder of a run. Nothing is asked before it is used.

    A local store is used in place: what is written there is not copied again.

    Args:
        uri: The artifact URI of the run.
        tracking_uri: MLflow's server or database, through which some artifacts go.
        policy: How often what a network may spoil is tried.
    """

    def __init__(self, uri: str, tracking_uri: str, policy: RetryPolicy = _POLICY) -> None:
        self.uri, self._policy = uri, policy
        self._store = get_artifact_repository(uri, tracking_uri=tracking_uri)
        # It tells of each try; we tell of the last.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._root: Path | None = None
        if isinstance(self._store, LocalArtifactRepository):
            self._root = Path(self._store.artifact_dir).resolve()

    @classmethod
    def of_run(cls, client: MlflowClient, run_id: str) -> ArtifactFolder:
        """The artifacts of a run that the server is asked about."""
        return cls(client.get_run(run_id).info.artifact_uri, client.tracking_uri)

    def local_path(self, name: str) -> Path | None:
        """Where ``name`` is, or would be, on this machine; None for a remote store."""
        _confine(name)
        return None if self._root is None else self._root / name

    def list_folder(self, name: str) -> list[str]:
        """Names of the files and folders directly in a folder, without its own name."""
        _confine(name)
        found = self._try(lambda: self._store.list_artifacts(name))
        return [PurePosixPath(info.path).name for info in found]

    def read_text(self, name: str) -> str:
        """A small file.

        Raises:
            FileNotFoundError: If there is none.
        """
        local = self.local_path(name)
        if local is not None:
            return local.read_text(encoding="utf-8")
        path = PurePosixPath(name)
        if path.name not in self.list_folder(str(path.parent)):
            raise FileNotFoundError(name)
        with tempfile.TemporaryDirectory() as folder:
            return self.fetch(name, Path(folder)).read_text(encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Put a small file there, whole or not at all; it is on the disk when this returns."""
        local, base = self.local_path(name), PurePosixPath(name)
        if local is not None:
            temporary = local.with_name(f".{local.name}.{os.getpid()}")
            _write_and_sync(temporary, text)
            temporary.replace(local)
            sync_folder(local.parent)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, base.name)
            _write_and_sync(path, text)
            self.upload(path, str(base.parent))

    def upload(self, path: Path, folder: str) -> None:
        """Send a file of this machine to a folder of the store; ``.`` is its root."""
        if folder == ".":
            self._try(lambda: self._store.log_artifact(str(path)))
            return
        _confine(folder)
        self._try(lambda: self._store.log_artifact(str(path), folder))

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring a file of a remote store into a folder of this machine, under its last name."""
        _confine(name)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            arrived = Path(scratch, "file")
            # MLflow's public call asks for a listing first, and hides the status of a failure.
            self._try(lambda: self._store._download_file(name, str(arrived)))
            return arrived.replace(folder / PurePosixPath(name).name)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing there is fine."""
        _confine(name)
        self._try(lambda: self._store.delete_artifacts(name))

    def _try(self, work: Callable[[], Result]) -> Result:
        if self._root is not None:
            return work()
        of_s3 = _s3_faults()
        try:
            return self._policy.call(work, (OSError, MlflowException, *of_s3), may_pass)
        except of_s3 as error:  # callers know of no S3
            raise OSError(" ".join(str(error).split())) from error


def may_pass(error: Exception) -> bool:
    """Whether a fault of the server, or of the way to it, may be gone a little later."""
    if isinstance(error, MlflowException):  # one without an answer counts as 500
        status = error.get_http_status_code()
    else:
        answer = getattr(error, "response", None)  # of requests, or botocore's dict
        if answer is None:
            return not isinstance(error, FileNotFoundError | PermissionError)
        is_s3 = isinstance(answer, dict)
        status = answer["ResponseMetadata"]["HTTPStatusCode"] if is_s3 else answer.status_code
    return bool(status == _TOO_MANY or status >= 500)


def _s3_faults() -> tuple[type[Exception], ...]:
    """What a store in S3 raises; nothing where its library is not installed."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return (BotoCoreError, ClientError)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _confine(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise ValueError(f"artifact name {name!r} leaves the run's artifact folder")


def _write_and_sync(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
