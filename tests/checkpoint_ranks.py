"""Real ranks that save, die while saving, and recover: `python checkpoint_ranks.py SPEC`.

Starting torch, DeepSpeed and megatron takes many seconds, so one process imports them and forks
the ranks of every job from there, before any thread or process group exists.

SPEC is a JSON file: {"results": PATH, "jobs": [{"action": ..., "uri": ..., "run": ...}, ...]}.
A job's result is what its rank 0 returned, or null if a rank was killed.
"""

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

from haloformer.launcher.checkpoint import CheckpointError, CheckpointStore
from layouts import Case, start, stop, tiny_config, train

CASE = Case(1, 2, 1)
BEFORE_THE_FORK = (sqlalchemy_store,)  # MLflow would import it in every rank, for a second
# Where a save can be cut short -> which rank dies there.
PHASES = {
    "file_half_written": 1,
    "before_hash": 1,
    "after_upload": 1,
    "before_manifest": 0,
    "manifest_half_written": 0,
    "before_prune": 0,
}
STATE = {"seed": 7, "data": {"0": [1, 2, 3]}}
LIMIT_S = 120


class DyingStore(CheckpointStore):
    """A store whose rank is killed by SIGKILL at a given phase; the code under test has no hook."""

    def arm(self, phase, rank):
        self.phase = phase if PHASES[phase] == rank else None

    def _die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, engine, topology, step, folder):
        super()._write(engine, topology, step, folder)
        if self.phase == "file_half_written":
            file = next(iter(folder.glob(f"shard-{topology.rank + 1:05d}-*")))
            os.truncate(file, file.stat().st_size // 2)
            self._die()

    def _publish(self, topology, step, attempt, folder):
        if self.phase == "before_hash":
            self._die()
        entries = super()._publish(topology, step, attempt, folder)
        if self.phase == "after_upload":
            self._die()
        return entries

    def _write_manifest(self, name, text):
        if self.phase == "before_manifest":
            self._die()
        if self.phase == "manifest_half_written":
            self.catalog.artifacts.local_path(name).write_text(text[: len(text) // 2])
            self._die()
        super()._write_manifest(name, text)

    def _prune(self, newest):
        if self.phase == "before_prune":
            self._die()
        super()._prune(newest)


def open_store(kind, job, staging):
    return kind(MlflowClient(job["uri"]), job["run"], tiny_config(CASE), Path(staging))


def uninterrupted(rank, job, staging):
    """Steps 1 to 3, each saved: the truth the others are held to."""
    topology, engine = start(CASE)
    store = open_store(CheckpointStore, job, staging)
    history = []
    for step in range(3):
        history += train(engine, topology, tiny_config(CASE), step, step + 1)
        store.save(engine, topology, step + 1, STATE)
    stop(engine)
    return {"history": history}


def killed(rank, job, staging):
    """Step 1 saved, step 2 cut short at the phase of the job."""
    topology, engine = start(CASE)
    store = open_store(DyingStore, job, staging)
    store.phase = None
    train(engine, topology, tiny_config(CASE), 0, 1)
    store.save(engine, topology, 1, STATE)
    train(engine, topology, tiny_config(CASE), 1, 2)
    store.arm(job["phase"], rank)
    store.save(engine, topology, 2, STATE)


def recovered(rank, job, staging):
    """From the newest valid checkpoint to step 3, saving each step."""
    store = open_store(CheckpointStore, job, staging)
    found = store.catalog.newest_valid().step
    topology, engine = start(CASE)
    state = store.load(engine, topology, found)
    history = []
    for step in range(found, 3):
        history += train(engine, topology, tiny_config(CASE), step, step + 1)
        store.save(engine, topology, step + 1, STATE)
    stop(engine)
    return {"found": found, "state": state, "history": history}


def refused(rank, job, staging):
    """What `load` says of the checkpoint of a step."""
    store = open_store(CheckpointStore, job, staging)
    topology, engine = start(CASE)
    try:
        store.load(engine, topology, job["step"])
    except CheckpointError as error:
        return {"error": str(error)}
    return {"error": None}


def unwritable(rank, job, staging):
    """What `save` says, on both ranks, when the store of rank 1 takes no files."""

    class FullStore(CheckpointStore):
        def _publish(self, topology, step, attempt, folder):
            if topology.rank == 1:
                raise OSError(28, "No space left on device")
            return super()._publish(topology, step, attempt, folder)

    store = open_store(FullStore, job, staging)
    topology, engine = start(CASE)
    try:
        store.save(engine, topology, 9, STATE)
    except CheckpointError as error:
        return {"error": str(error), "left": store.catalog.artifacts.list_folder("checkpoints")}
    return {"error": None}


ACTIONS = {f.__name__: f for f in (uninterrupted, killed, recovered, refused, unwritable)}


def child(rank, job, folder):
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
        victim = PHASES[job["phase"]] if job["action"] == "killed" else None
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
