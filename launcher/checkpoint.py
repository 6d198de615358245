"""Checkpoints of a run as its ranks see them: saved beside training, loaded before it.

    training     step 10 | copy | step 11 | step 12 | step 13 ...
    background             write, fsync, hash, upload, manifest -> committed

Training waits for the copy to host memory, and for the checkpoint before if that one is still
being written: there is never more than one on its way.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from mlflow import MlflowClient
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.catalog import Catalog, folder_of
from haloformer.launcher.commit import CheckpointError, Committer, reasons, together
from haloformer.launcher.engine import Engine
from haloformer.launcher.exchange import Json, gather_json
from haloformer.launcher.fragments import load_fragments, load_weights, take_snapshot
from haloformer.launcher.manifest import Manifest, fault_of_file
from haloformer.launcher.snapshot import Snapshot
from haloformer.launcher.topology import Topology

_LONGEST_PAUSE_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How saving a checkpoint ended.

    Attributes:
        step: Of the checkpoint.
        error: Why it was not committed, None if it was; the same on every rank.
        waited: Seconds that training stood still for it.
        seconds: From the snapshot to the commit.
    """

    step: int
    error: str | None
    waited: float
    seconds: float


@dataclass(frozen=True)
class _Pending:
    """A checkpoint on its way."""

    step: int
    snapshot: Snapshot
    state: dict[str, Json]
    started: float
    waited: float


class CheckpointStore:
    """The checkpoints of one run. All methods are collective: every rank calls them."""

    def __init__(
        self,
        place: MlflowClient | ArtifactFolder,
        run_id: str,
        config: TrainConfig,
        staging: Path,
        topology: Topology,
    ) -> None:
        """Open the artifacts of a run.

        Args:
            place: The run's artifacts, or a client that knows where they are.
            run_id: The run.
            config: Its recipe; ``checkpoint`` says what to keep.
            staging: A folder of this machine, for files on their way to or from a remote store.
            topology: Of the ranks that save and load.
        """
        self.catalog = Catalog(place, run_id)
        self._config, self._staging, self._topology = config, staging, topology
        self._committer = self._make_committer()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._result: Future[Manifest]
        self._ended: list[Outcome] = []

    def save(self, engine: Engine, step: int, state: dict[str, Json]) -> None:
        """Copy what a checkpoint needs, and commit it in the background; see ``poll``.

        Args:
            engine: Right after optimizer step ``step``.
            step: Optimizer steps taken.
            state: What the trainer needs besides weights and moments; rank 0's counts.
        """
        started = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(engine, self._topology)
        waited = time.perf_counter() - started
        self._begin(_Pending(step, snapshot, state, started, waited))

    def save_and_wait(
        self, engine: Engine, step: int, state: dict[str, Json], patience: float
    ) -> None:
        """Save the last checkpoint of this process; what fails is tried again.

        Training is over and this is its result, so that a server which is away for a while, or a
        full disk, must not be its end.

        Args:
            engine: As for ``save``.
            step: As for ``save``.
            state: As for ``save``.
            patience: Seconds of pauses between attempts, in all; the same on every rank.

        Raises:
            CheckpointError: If the last attempt failed, too.
        """
        self.save(engine, step, state)
        pending, pause, paused = self._pending, 1.0, 0.0
        assert pending is not None
        while (error := self.wait()) is not None:
            if paused + pause > patience:
                raise CheckpointError(error)
            if self._topology.rank == 0:
                _log.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
            paused, pause = paused + pause, min(2 * pause, _LONGEST_PAUSE_S)
            self._begin(pending)

    def poll(self) -> list[Outcome]:
        """How checkpoints ended since the last call, on this rank; does not wait."""
        if self._pending is not None and self._result.done():
            self.wait()
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> str | None:
        """Wait for the checkpoint on its way; why it failed, None if it did not."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        error = None
        try:
            self._result.result()
        except CheckpointError as fault:
            error = str(fault)
        seconds = time.perf_counter() - pending.started
        self._ended.append(Outcome(pending.step, error, pending.waited, seconds))
        return error

    def load(self, engine: Engine, step: int) -> dict[str, Json]:
        """Bring a fresh engine to where ``save`` was called, on this layout or any other.

        Returns:
            The ``state`` that was saved.

        Raises:
            ValueError: If there is no such checkpoint, or it is of another model.
            CheckpointError: If one of its files is damaged; names the file.
        """
        assert self._pending is None, "the control group is the background's"
        manifest = self.catalog.find(step)
        with self._on_this_host(manifest) as folder:
            try:
                load_fragments(engine, self._topology, folder, step)
            except CheckpointException as error:
                raise CheckpointError(
                    f"checkpoint step {step} could not be read ({reasons(error)})"
                ) from error
        return manifest.state

    def load_weights(self, model: nn.Module, step: int) -> None:
        """Fill a model that no engine holds with the weights of a checkpoint, in fp32.

        Args:
            model: As ``Task.build_model`` makes it.
            step: Of the checkpoint.

        Raises:
            ValueError: If there is no such checkpoint, or it is of another model.
            CheckpointError: If one of its files is damaged; names the file.
        """
        with self._on_this_host(self.catalog.find(step)) as folder:
            try:
                load_weights(model, folder, self._topology)
            except CheckpointException as error:
                raise CheckpointError(
                    f"checkpoint step {step} could not be read ({reasons(error)})"
                ) from error

    def _make_committer(self) -> Committer:
        return Committer(self.catalog, self._config, self._staging, self._topology)

    def _begin(self, pending: _Pending) -> None:
        self._pending = pending
        self._result = self._worker.submit(
            self._committer.commit, pending.snapshot, pending.step, pending.state
        )

    @contextlib.contextmanager
    def _on_this_host(self, manifest: Manifest) -> Iterator[Path]:
        """A local folder with exactly the files of a checkpoint, every hash compared."""
        group, device = self._topology.control_group, torch.device("cpu")
        place = self.catalog.artifacts.local_path(f"{folder_of(manifest.step)}/{manifest.folder}")
        hosts = gather_json(socket.gethostname(), group, device)
        here = [rank for rank, host in enumerate(hosts) if host == hosts[self._topology.rank]]
        fetches = place is None and self._topology.rank == here[0]
        folder = place if place is not None else self._staging / f"load-rank-{here[0]:05d}"
        try:
            if place is None:
                _, fault = together(lambda: self._fetch(manifest, folder, fetches), group)
                if fault:
                    raise CheckpointError(f"checkpoint step {manifest.step}: {fault}")
            faults = self._faults(manifest, folder, here.index(self._topology.rank), len(here))
            found = [fault for part in gather_json(faults, group, device) for fault in part]
            if found:
                raise CheckpointError(
                    f"checkpoint step {manifest.step} is damaged: {folder_of(manifest.step)}/"
                    f"{found[0]}; resume again to use the one before"
                )
            yield folder
            if place is None:
                dist.barrier(group)  # others of this host may still be reading
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
