"""Real ranks that save, die while saving, and recover: `python checkpoint_ranks.py SPEC`.

Starting torch, DeepSpeed and megatron takes many seconds, so one process imports them and forks
the ranks of every job from there, before any thread or process group exists.

SPEC is a JSON file: {"results": PATH, "jobs": [{"action": ..., "uri": ..., "run": ...}, ...]}.
A job's result is what its rank 0 returned, or null if a rank was killed.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from mlflow import MlflowClient
from mlflow.store.tracking import sqlalchemy_store

from dying import PHASES, DyingCommitter
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.commit import CheckpointError, Committer
from layouts import Case, start, stop, tiny_config, train

CASE = Case(1, 2, 1)
BEFORE_THE_FORK = (sqlalchemy_store,)  # MLflow would import it in every rank, for a second
# Where a save is cut short -> which rank dies there.
VICTIMS = {phase: 1 if rank is None else rank for phase, rank in PHASES.items()}
STATE = {"seed": 7, "data": {"0": [1, 2, 3]}}
LIMIT_S = 300


class DyingStore(CheckpointStore):
    """A store with that committer."""

    def _make_committer(self):
        return DyingCommitter(self.catalog, self._config, self._staging, self._topology)

    def arm(self, phase):
        if self._topology.rank == VICTIMS[phase]:
            self._committer.phase = phase


def open_store(kind, job, staging, topology):
    return kind(MlflowClient(job["uri"]), job["run"], tiny_config(CASE), Path(staging), topology)


def save(store, engine, step):
    store.save_and_wait(engine, step, STATE, patience=0.0)


def uninterrupted(rank, job, staging):
    """Steps 1 to 3, each saved: the truth the others are held to."""
    topology, engine = start(CASE)
    store = open_store(CheckpointStore, job, staging, topology)
    history = []
    for step in range(3):
        history += train(engine, topology, tiny_config(CASE), step, step + 1)
        save(store, engine, step + 1)
    stop(topology, engine)
    return {"history": history}


def killed(rank, job, staging):
    """Step 1 saved, step 2 cut short at the phase of the job."""
    topology, engine = start(CASE)
    store = open_store(DyingStore, job, staging, topology)
    train(engine, topology, tiny_config(CASE), 0, 1)
    save(store, engine, 1)
    train(engine, topology, tiny_config(CASE), 1, 2)
    store.arm(job["phase"])
    save(store, engine, 2)


def recovered(rank, job, staging):
    """From the newest valid checkpoint to step 3, saving each step."""
    topology, engine = start(CASE)
    store = open_store(CheckpointStore, job, staging, topology)
    found = store.catalog.newest_valid().step
    state = store.load(engine, found)
    history = []
    for step in range(found, 3):
        history += train(engine, topology, tiny_config(CASE), step, step + 1)
        save(store, engine, step + 1)
    stop(topology, engine)
    return {"found": found, "state": state, "history": history}


def refused(rank, job, staging):
    """What `load` says of the checkpoint of a step."""
    topology, engine = start(CASE)
    store = open_store(CheckpointStore, job, staging, topology)
    try:
        store.load(engine, job["step"])
    except CheckpointError as error:
        return {"error": str(error)}
    return {"error": None}


class FullCommitter(Committer):
    """Rank 1 finds its disk full for so many attempts."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.num_failures = 0

    def _publish(self, step, attempt, folder):
        if self._topology.rank == 1 and self.num_failures:
            self.num_failures -= 1
            raise OSError(28, "No space left on device")
        return super()._publish(step, attempt, folder)


class FullStore(CheckpointStore):
    """A store with that committer."""

    def _make_committer(self):
        return FullCommitter(self.catalog, self._config, self._staging, self._topology)


def unwritable(rank, job, staging):
    """What both ranks hear when rank 1 cannot write: once while training, then at its end."""
    topology, engine = start(CASE)
    store = open_store(FullStore, job, staging, topology)
    committer = store._committer
    committer.num_failures = 1
    store.save(engine, 7, STATE)
    save(store, engine, 8)  # waits for the one before
    told = [(outcome.step, outcome.error) for outcome in store.poll()]
    committer.num_failures = 2
    try:
        store.save_and_wait(engine, 9, STATE, patience=0.0)
    except CheckpointError as error:
        told.append((9, str(error)))
    torch.distributed.barrier()  # rank 0 clears up
    left = store.catalog.artifacts.list_folder("checkpoints")
    store.save_and_wait(engine, 9, STATE, patience=1.0)  # room for one more attempt
    committed = [manifest.step for manifest in store.catalog.committed()]
    return {"told": told, "left": left, "committed": committed}


class GatedCommitter(Committer):
    """Uploads nothing before its gate is opened."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gate = threading.Event()

    def _publish(self, step, attempt, folder):
        self.gate.wait()
        return super()._publish(step, attempt, folder)


class GatedStore(CheckpointStore):
    """A store with that committer."""

    def _make_committer(self):
        return GatedCommitter(self.catalog, self._config, self._staging, self._topology)


def overlapped(rank, job, staging):
    """Train on while the upload of step 1 stands still, then go back to what was saved there."""
    topology, engine = start(CASE)
    config = tiny_config(CASE)
    store = open_store(GatedStore, job, staging, topology)
    history = train(engine, topology, config, 0, 1)
    store.save(engine, 1, STATE)
    history += train(engine, topology, config, 1, 2)
    early = [outcome.step for outcome in store.poll()]
    store._committer.gate.set()
    store.save(engine, 2, STATE)  # waits for step 1, not for itself
    told = [outcome.step for outcome in store.poll()]
    save(store, engine, 2)
    stop(topology, engine)
    topology, engine = start(CASE)
    store = open_store(CheckpointStore, job, staging, topology)
    store.load(engine, 1)
    again = train(engine, topology, config, 1, 2)
    stop(topology, engine)
    return {"early": early, "told": told, "history": history, "again": again}


ACTIONS = {
    action.__name__: action
    for action in (uninterrupted, killed, recovered, refused, unwritable, overlapped)
}


def child(rank, job, folder):
    gc.freeze()  # as in dist.py
    signal.alarm(LIMIT_S)  # a rank that waits for a dead one ends by itself
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=CASE.world,
        timeout=timedelta(seconds=LIMIT_S),
    )
    result = ACTIONS[job["action"]](rank, job, f"{folder}/staging")
    Path(folder, f"result{rank}").write_text(json.dumps(result))
    torch.distributed.barrier()


def run_job(job):
    """Fork the ranks of one job; when one is killed, end the others by pid."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(CASE.world):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    child(rank, job, folder)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        victim = VICTIMS[job["phase"]] if job["action"] == "killed" else None
        status_of, running = {}, dict(zip(pids, range(CASE.world), strict=True))
        while running:
            pid, status = os.wait()
            status_of[running.pop(pid)] = status
            if status != 0:  # nobody waits for the dead; the victim dies by itself
                for other, rank in running.items():
                    if rank != victim:
                        os.kill(other, signal.SIGKILL)
        if victim is not None:
            assert status_of[victim] == signal.SIGKILL, (job, status_of)
            return None
        assert set(status_of.values()) == {0}, (job, status_of)
        results = [Path(folder, f"result{r}").read_text() for r in range(CASE.world)]
        assert len(set(results)) == 1, results
        return json.loads(results[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    assert threading.active_count() == 1, "forking needs a process without threads"
    answers = [run_job(job) for job in spec["jobs"]]
    Path(spec["results"]).write_text(json.dumps(answers))
