"""Saving and loading a run on all its ranks, into its MLflow artifacts.

    every rank:  write slices -> fsync -> hash -> upload (a local store: written in place)
    rank 0:      when all have said what they wrote, manifest.json, last; then delete the old

A rank killed anywhere before the last line leaves files that no manifest names: the checkpoint
does not exist, and the next attempt at any step deletes them. Every attempt has a folder of its
own, so files of two attempts never mix.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch.distributed.checkpoint.api import CheckpointException

from haloformer.configs.load import config_hash
from haloformer.configs.schema import TrainConfig
from haloformer.launcher.artifacts import sync_folder
from haloformer.launcher.catalog import MANIFEST, Catalog, folder_of
from haloformer.launcher.engine import Engine
from haloformer.launcher.exchange import Json, gather_json
from haloformer.launcher.fragments import files_of_rank, load_fragments, save_fragments
from haloformer.launcher.manifest import (
    FORMAT,
    FileEntry,
    LayoutRecord,
    Manifest,
    describe_file,
    fault_of_file,
)
from haloformer.launcher.topology import Topology

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; every rank raises it, with every rank's reason."""


class CheckpointStore:
    """The checkpoints of one run. All methods are collective: every rank calls them."""

    def __init__(
        self, client: MlflowClient, run_id: str, config: TrainConfig, staging: Path
    ) -> None:
        """Open the artifacts of a run.

        Args:
            client: Connected to the tracking server that knows the run.
            run_id: The run.
            config: Its recipe; ``checkpoint`` says what to keep.
            staging: A folder of this machine, for files on their way to or from a remote store.
        """
        self.catalog = Catalog(client, run_id)
        self._config = config
        self._staging = staging

    def save(
        self, engine: Engine, topology: Topology, step: int, state: dict[str, Json]
    ) -> Manifest:
        """Write and commit a checkpoint, then drop the ones that are no longer wanted.

        Args:
            engine: Right after optimizer step ``step``.
            topology: Its topology.
            step: Optimizer steps taken.
            state: What the trainer needs besides weights and moments; rank 0's counts.

        Raises:
            CheckpointError: On every rank, if any rank could not write its part. The checkpoints
                that were there before still are.
        """
        attempt = self._together(topology, step, lambda: self._begin(topology, step))[0]
        folder = self._folder_of_attempt(topology, step, attempt)
        try:
            self._write(engine, topology, step, folder)
            written = self._together(
                topology, step, lambda: self._publish(topology, step, attempt, folder)
            )
        except CheckpointError:
            if topology.rank == 0:  # a full disk should not stay full of half a checkpoint
                with contextlib.suppress(OSError, MlflowException):
                    self.catalog.artifacts.delete(f"{folder_of(step)}/data-{attempt}")
            raise
        files = [file for part in written for file in part]
        manifest = self._manifest(topology, step, state, files)
        self._together(topology, step, lambda: self._commit(topology, manifest))
        if topology.rank == 0:
            self._prune(manifest)
        return manifest

    def load(self, engine: Engine, topology: Topology, step: int) -> dict[str, Json]:
        """Bring a fresh engine to where ``save`` was called, on this layout or any other.

        Returns:
            The ``state`` that was saved.

        Raises:
            ValueError: If there is no such checkpoint, or it is of another model.
            CheckpointError: If one of its files is damaged; names the file.
        """
        manifest = self.catalog.find(step)
        with self._on_this_host(topology, manifest) as folder:
            try:
                load_fragments(engine, topology, folder, step)
            except CheckpointException as error:
                raise CheckpointError(
                    f"checkpoint step {step} could not be read ({_reasons(error)})"
                ) from error
        return manifest.state

    def _begin(self, topology: Topology, step: int) -> str:
        """Rank 0 deletes what an uncommitted attempt left at this step, and names the new one."""
        if topology.rank != 0:
            return ""
        if self.catalog.read(step) is None:
            self.catalog.artifacts.delete(folder_of(step))
        return secrets.token_hex(8)

    def _folder_of_attempt(self, topology: Topology, step: int, attempt: str) -> Path:
        local = self.catalog.artifacts.local_path(f"{folder_of(step)}/data-{attempt}")
        if local is not None:
            return local
        # Of this rank alone, so that it can sweep up what an earlier process left here.
        mine = self._staging / f"rank-{topology.rank:05d}"
        shutil.rmtree(mine, ignore_errors=True)
        return mine / f"data-{attempt}"

    def _write(self, engine: Engine, topology: Topology, step: int, folder: Path) -> None:
        try:
            save_fragments(engine, topology, folder)  # DCP fsyncs every file
        except CheckpointException as error:
            # DCP raises it on all ranks when any failed; it is no Exception.
            raise CheckpointError(_not_written(step, _reasons(error))) from error

    def _publish(
        self, topology: Topology, step: int, attempt: str, folder: Path
    ) -> list[dict[str, Json]]:
        """Hash what this rank wrote, from the disk, and upload it; say what it is."""
        entries = []
        remote = self.catalog.artifacts.local_path(folder_of(step)) is None
        for path in files_of_rank(folder, topology.rank):
            entries.append(describe_file(path, f"data-{attempt}/{path.name}").model_dump())
            if remote:
                self.catalog.artifacts.upload(path, f"{folder_of(step)}/data-{attempt}")
        if remote:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for touched in (folder, folder.parent, folder.parent.parent):
                sync_folder(touched)
        return entries

    def _manifest(
        self, topology: Topology, step: int, state: dict[str, Json], files: list[dict[str, Json]]
    ) -> Manifest:
        layout, parallel = topology.layout, self._config.parallel
        return Manifest(
            format=FORMAT,
            step=step,
            config=self._config.model_dump(mode="json"),
            config_hash=config_hash(self._config),
            layout=LayoutRecord(
                data=layout.data,
                context=layout.context,
                tensor=layout.tensor,
                zero_stage=parallel.zero_stage,
                precision=parallel.precision,
            ),
            state=state,
            files=[FileEntry(**file) for file in files],
        )

    def _commit(self, topology: Topology, manifest: Manifest) -> None:
        if topology.rank != 0:
            return
        artifacts, folder = self.catalog.artifacts, folder_of(manifest.step)
        for entry in manifest.files:
            local = artifacts.local_path(f"{folder}/{entry.name}")
            if local is not None and not local.is_file():
                raise FileNotFoundError(
                    f"{local}, written by another rank, is not visible to rank 0; the artifact "
                    "folder must be one that all hosts share, or a server's"
                )
        self._write_manifest(f"{folder}/{MANIFEST}", manifest.to_text())

    def _prune(self, newest: Manifest) -> None:
        keep = self._config.checkpoint
        try:
            self.catalog.prune(newest, keep.keep_last, keep.keep_every)
        except (OSError, MlflowException) as error:
            # The new checkpoint stands; a server that does not let us delete only costs space.
            _log.warning("old checkpoints could not be deleted: %s", _one_line(error))

    def _write_manifest(self, name: str, text: str) -> None:
        self.catalog.artifacts.write_text(name, text)

    @contextlib.contextmanager
    def _on_this_host(self, topology: Topology, manifest: Manifest) -> Iterator[Path]:
        """A local folder with exactly the files of a checkpoint, every hash compared."""
        place = self.catalog.artifacts.local_path(f"{folder_of(manifest.step)}/{manifest.folder}")
        hosts = gather_json(socket.gethostname(), None, topology.device)
        here = [rank for rank, host in enumerate(hosts) if host == hosts[topology.rank]]
        fetches = place is None and topology.rank == here[0]
        folder = place if place is not None else self._staging / f"load-rank-{here[0]:05d}"
        try:
            if place is None:
                self._together(
                    topology, manifest.step, lambda: self._fetch(manifest, folder, fetches)
                )
            faults = self._faults(manifest, folder, here.index(topology.rank), len(here))
            found = [fault for part in gather_json(faults, None, topology.device) for fault in part]
            if found:
                raise CheckpointError(
                    f"checkpoint step {manifest.step} is damaged: {folder_of(manifest.step)}/"
                    f"{found[0]}; resume again to use the one before"
                )
            yield folder
        finally:
            if fetches:
                shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, manifest: Manifest, folder: Path, fetches: bool) -> None:
        if not fetches:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for entry in manifest.files:
            self.catalog.artifacts.fetch(f"{folder_of(manifest.step)}/{entry.name}", folder)

    def _faults(self, manifest: Manifest, folder: Path, index: int, ranks: int) -> list[str]:
        """Faults in this rank's share of the files; all ranks of a host hash together."""
        paths = {entry: folder / entry.name.partition("/")[2] for entry in manifest.files}
        faults = [fault_of_file(entry, paths[entry]) for entry in manifest.files[index::ranks]]
        strangers = set(folder.glob("*.safetensors")) - set(paths.values())
        if strangers and index == 0:
            faults.append(f"{manifest.folder}/{min(strangers).name} is not in the manifest")
        return [fault for fault in faults if fault is not None]

    def _together(self, topology: Topology, step: int, work: Callable[[], Any]) -> list[Any]:
        """Do a part of the work on every rank; all fail if one does. Returns every rank's result.

        This is also the barrier: no rank goes on before all are done.
        """
        try:
            mine = {"value": work(), "error": None}
        except (OSError, MlflowException) as error:
            mine = {"value": None, "error": _one_line(error)}
        results = gather_json(mine, None, topology.device)
        faults = [f"rank {i}: {r['error']}" for i, r in enumerate(results) if r["error"]]
        if faults:
            raise CheckpointError(_not_written(step, "; ".join(faults)))
        return [result["value"] for result in results]


def _reasons(error: CheckpointException) -> str:
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {_one_line(reason)}" for rank, (reason, _) in failures)


def _not_written(step: int, reasons: str) -> str:
    return f"checkpoint step {step} failed ({reasons}); the committed ones are untouched"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
