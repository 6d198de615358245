"""Commits one checkpoint, on all ranks together: the manifest is written last.

    every rank:  write slices -> fsync -> hash -> upload (a local store: written in place)
    rank 0:      when all have said what they wrote, manifest.json, last; then delete the old

A rank killed anywhere before the last line leaves files that no manifest names: the checkpoint
does not exist, and the next attempt at any step deletes them. Every attempt has a folder of its
own, so files of two attempts never mix.

This runs beside training, in a thread of each rank and in a group of its own.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from haloformer.configs.load import config_hash
from haloformer.configs.schema import TrainConfig
from haloformer.launcher.artifacts import sync_folder
from haloformer.launcher.catalog import MANIFEST, Catalog, folder_of
from haloformer.launcher.exchange import Json, gather_json
from haloformer.launcher.manifest import (
    FORMAT,
    FileEntry,
    LayoutRecord,
    Manifest,
    describe_file,
)
from haloformer.launcher.snapshot import Snapshot, files_of_rank
from haloformer.launcher.topology import Topology

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; every rank raises it, with every rank's reason."""


class Committer:
    """Writes checkpoints of one run.

    Args:
        catalog: The run's checkpoints.
        config: Its recipe; ``checkpoint`` says what to keep.
        staging: A folder of this machine, for files on their way to a remote store.
        topology: Of the ranks that write.
    """

    def __init__(
        self, catalog: Catalog, config: TrainConfig, staging: Path, topology: Topology
    ) -> None:
        self._catalog, self._config = catalog, config
        self._staging, self._topology = staging, topology

    def commit(self, snapshot: Snapshot, step: int, state: dict[str, Json]) -> Manifest:
        """Write and commit a snapshot, then drop the checkpoints that are no longer wanted.

        Collective over the control group, which nothing else may use meanwhile.

        Args:
            snapshot: This rank's part.
            step: Optimizer steps taken.
            state: What the trainer needs besides weights and moments; rank 0's counts.

        Raises:
            CheckpointError: On every rank, if any rank could not write its part. The checkpoints
                that were there before still are.
        """
        attempt = self._together(step, lambda: self._begin(step))[0]
        folder = self._folder_of_attempt(step, attempt)
        try:
            self._write(snapshot, step, folder)
            written = self._together(step, lambda: self._publish(step, attempt, folder))
        except CheckpointError:
            # A full disk should not stay full of half a checkpoint.
            with contextlib.suppress(OSError, MlflowException):
                self._clear(step)
            raise
        files = [file for part in written for file in part]
        manifest = self._manifest(step, state, files)
        self._together(step, lambda: self._write_last(manifest))
        if self._topology.rank == 0:
            self._prune(manifest)
        return manifest

    def _begin(self, step: int) -> str:
        """Rank 0 names the attempt."""
        self._clear(step)
        return secrets.token_hex(8) if self._topology.rank == 0 else ""

    def _clear(self, step: int) -> None:
        """Rank 0 deletes what an attempt that was not committed left at this step."""
        if self._topology.rank == 0 and self._catalog.read(step) is None:
            self._catalog.artifacts.delete(folder_of(step))

    def _folder_of_attempt(self, step: int, attempt: str) -> Path:
        local = self._catalog.artifacts.local_path(f"{folder_of(step)}/data-{attempt}")
        if local is not None:
            return local
        # Of this rank alone, so that it can sweep up what an earlier process left here.
        mine = self._staging / f"rank-{self._topology.rank:05d}"
        shutil.rmtree(mine, ignore_errors=True)
        return mine / f"data-{attempt}"

    def _write(self, snapshot: Snapshot, step: int, folder: Path) -> None:
        try:
            snapshot.write(folder, self._topology.control_group)  # DCP fsyncs every file
        except CheckpointException as error:
            # DCP raises it on all ranks when any failed; it is no Exception.
            raise CheckpointError(_not_written(step, reasons(error))) from error

    def _publish(self, step: int, attempt: str, folder: Path) -> list[dict[str, Json]]:
        """Hash what this rank wrote, from the disk, and upload it; say what it is."""
        entries = []
        remote = self._catalog.artifacts.local_path(folder_of(step)) is None
        for path in files_of_rank(folder, self._topology.rank):
            entries.append(describe_file(path, f"data-{attempt}/{path.name}").model_dump())
            if remote:
                self._catalog.artifacts.upload(path, f"{folder_of(step)}/data-{attempt}")
        if remote:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for touched in (folder, folder.parent, folder.parent.parent):
                sync_folder(touched)
        return entries

    def _manifest(
        self, step: int, state: dict[str, Json], files: list[dict[str, Json]]
    ) -> Manifest:
        layout, parallel = self._topology.layout, self._config.parallel
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

    def _write_last(self, manifest: Manifest) -> None:
        if self._topology.rank != 0:
            return
        artifacts, folder = self._catalog.artifacts, folder_of(manifest.step)
        for entry in manifest.files:
            local = artifacts.local_path(f"{folder}/{entry.name}")
            if local is not None and not local.is_file():
                raise FileNotFoundError(
                    f"{local}, written by another rank, is not visible to rank 0; the artifact "
                    "folder must be one that all hosts share, or a server's"
                )
        self._write_manifest(f"{folder}/{MANIFEST}", manifest.to_text())

    def _write_manifest(self, name: str, text: str) -> None:
        self._catalog.artifacts.write_text(name, text)

    def _prune(self, newest: Manifest) -> None:
        keep = self._config.checkpoint
        try:
            self._catalog.prune(newest, keep.keep_last, keep.keep_every)
        except (OSError, MlflowException) as error:
            # The new checkpoint stands; a server that does not let us delete only costs space.
            _log.warning("old checkpoints could not be deleted: %s", one_line(error))

    def _together(self, step: int, work: Callable[[], Any]) -> list[Any]:
        results, faults = together(work, self._topology.control_group)
        if faults:
            raise CheckpointError(_not_written(step, faults))
        return results


def together(work: Callable[[], Any], group: ProcessGroup) -> tuple[list[Any], str]:
    """Do a part of the work on every rank of a gloo group.

    This is also a barrier: no rank goes on before all are done.

    Returns:
        Every rank's result, and what went wrong, with the number of each rank: "" if nothing.
    """
    try:
        mine = {"value": work(), "error": None}
    except (OSError, MlflowException) as error:
        mine = {"value": None, "error": one_line(error)}
    results = gather_json(mine, group, torch.device("cpu"))
    faults = [f"rank {i}: {r['error']}" for i, r in enumerate(results) if r["error"]]
    return [result["value"] for result in results], "; ".join(faults)


def reasons(error: CheckpointException) -> str:
    """What DCP says went wrong, rank by rank, on one line."""
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {one_line(reason)}" for rank, (reason, _) in failures)


def one_line(error: BaseException) -> str:
    """An error's type and text, short enough for a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _not_written(step: int, faults: str) -> str:
    return f"checkpoint step {step} failed ({faults}); the committed ones are untouched"
