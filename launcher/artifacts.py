"""The artifacts of one MLflow run: a folder on this machine, or behind a server or object store."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository


class ArtifactFolder:
    """Files by name below the artifact folder of a run.

    A local store is used in place: what is written there is not copied again.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        uri = client.get_run(run_id).info.artifact_uri
        self._store = get_artifact_repository(uri, tracking_uri=client.tracking_uri)
        self._root: Path | None = None
        if isinstance(self._store, LocalArtifactRepository):
            self._root = Path(self._store.artifact_dir).resolve()

    def local_path(self, name: str) -> Path | None:
        """Where ``name`` is, or would be, on this machine; None for a remote store."""
        _confine(name)
        return None if self._root is None else self._root / name

    def list_folder(self, name: str) -> list[str]:
        """Names of the files and folders directly in a folder, without its own name."""
        _confine(name)
        return [PurePosixPath(info.path).name for info in self._store.list_artifacts(name)]

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
            self._store.log_artifact(str(path), str(base.parent))

    def upload(self, path: Path, folder: str) -> None:
        """Send a file of this machine to a folder of a remote store."""
        _confine(folder)
        self._store.log_artifact(str(path), folder)

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring a file of a remote store into a folder of this machine, under its last name."""
        _confine(name)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            arrived = Path(self._store.download_artifacts(name, scratch))
            return arrived.replace(folder / PurePosixPath(name).name)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing there is fine."""
        _confine(name)
        self._store.delete_artifacts(name)


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
