"""Starts the real worker again and again, in forked ranks: a life of a run takes seconds.

Importing torch, DeepSpeed, megatron and MLflow takes longer than a small training run, so one
process imports them and forks the ranks of every life from there. It must have no thread and no
open connection: whatever asks MLflow something does so in a child, too (``in_child``).
"""

import contextlib
import gc
import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from mlflow.store.tracking import sqlalchemy_store

from haloformer.configs.load import parse_config
from haloformer.configs.schema import TrackingConfig, TrainConfig
from haloformer.launcher import rank_main, tracking
from haloformer.launcher.catalog import Catalog, folder_of
from haloformer.launcher.known_runs import KnownRun, read_known, start_run
from haloformer.launcher.run_dir import Orders, Plan, RunDir
from ports import port_of_our_own

BEFORE_THE_FORK = (sqlalchemy_store,)  # MLflow would import it in every rank, for a second
ATTEMPT = "life"
LIMIT_S = 300


def in_child(work: Callable[[], Any]) -> Any:
    """What a function returns in a forked process, through JSON."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        pid = fork(lambda: answer.write_text(json.dumps(work())))
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"ended with status {status}"
        return json.loads(answer.read_text())


def fork(work: Callable[[], Any]) -> int:
    """Start a process that does the work and ends; its pid."""
    assert threading.active_count() == 1, "forking needs a process without threads"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        gc.freeze()  # as in dist.py
        signal.alarm(LIMIT_S)  # a rank that waits for a dead one ends by itself
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Runner:
    """One run of a recipe, in as many lives as it takes.

    Args:
        folder: With the project of ``launcher_runs.write_project`` and room for everything else.
        name: Of the run.
        server: Address of an MLflow server that keeps the checkpoints and its database, ``db``, in
            ``folder``; None keeps them in the folder of the run.
    """

    def __init__(self, folder: Path, name: str, server: str | None = None) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
        for part in ("train", "eval"):
            self.recipe["data"][part] = str(folder / self.recipe["data"][part])
        self.database = folder / ("mlflow.db" if server is None else "db")
        uri = f"sqlite:///{self.database}" if server is None else server

        def begin() -> dict[str, Any]:
            # Without a server as if it were away: the run is made when there is something to tell.
            client = None if server is None else tracking.connect(server)
            return asdict(start_run(client, uri, TrackingConfig(), name, folder / "runs"))

        self.known = KnownRun(**in_child(begin))
        self.run_dir = RunDir(folder / "runs" / self.known.run_id)

    def config(self, parallel: dict[str, int] | None = None) -> TrainConfig:
        """The recipe, spread over the ranks in another way if asked."""
        recipe = self.recipe if parallel is None else {**self.recipe, "parallel": parallel}
        return parse_config(recipe, "recipe")

    def committed(self) -> int | None:
        """The step to go on from."""

        def ask() -> int | None:
            newest = self._catalog().newest_valid()
            return None if newest is None else newest.step

        return in_child(ask)

    def live(
        self,
        num_ranks: int,
        prepare: Callable[[int], None] | None = None,
        victim: int | None = None,
        parallel: dict[str, int] | None = None,
    ) -> bool:
        """One start of the ranks, from the newest checkpoint to the end or to the first death.

        Args:
            num_ranks: Ranks.
            prepare: Called in each rank, with its number, before it begins.
            victim: The rank that may kill itself.
            parallel: Another parallel section than the recipe's.

        Returns:
            True when all ranks came to the end, False when the victim died of SIGKILL.
        """
        config = self.config(parallel)
        self.run_dir.create()
        self.run_dir.write_plan(
            Plan(
                run_id=self.known.run_id,
                tracking_uri=self.known.tracking_uri,
                artifact_uri=self.known.artifact_uri,
                config=config.model_dump(mode="json"),
                world_size=num_ranks,
                resume_step=self.committed(),
            )
        )
        self.run_dir.write_orders(Orders(ATTEMPT, stop=False))
        port = port_of_our_own()
        running = {}
        for rank in range(num_ranks):
            pid = fork(lambda rank=rank: self._be_rank(rank, num_ranks, port, prepare))
            running[pid] = rank
        return _wait_for(running, victim)

    def records(self) -> list[dict[str, float]]:
        """Step and held-out records without what the clock says."""
        keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
        return [
            {key: record[key] for key in keys if key in record}
            for record in self.run_dir.read_metrics()
        ]

    def files(self) -> dict[str, tuple[Any, bytes]]:
        """Header and tensors of every file of the newest checkpoint."""
        with tempfile.TemporaryDirectory() as folder:

            def copy() -> None:
                catalog = self._catalog()
                newest = catalog.newest_valid()
                assert newest is not None, "no checkpoint was committed"
                for entry in newest.files:
                    catalog.artifacts.fetch(f"{folder_of(newest.step)}/{entry.name}", Path(folder))

            in_child(copy)
            return {path.name: _split(path.read_bytes()) for path in Path(folder).iterdir()}

    def told(self) -> list[tuple[int, float]]:
        """Step and loss of all that MLflow has heard, a step that it heard twice twice."""
        known = read_known(self.run_dir.path)
        assert known is not None
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return database.execute(
                "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = 'loss' ORDER BY step",
                (known.mlflow_id,),
            ).fetchall()

    def told_of_phases(self) -> list[tuple[str, str, int, float]]:
        """Phase, its status, step and loss of all that MLflow has heard of the phases."""
        known = read_known(self.run_dir.path)
        assert known is not None
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return database.execute(
                "SELECT phase.value, runs.status, metrics.step, metrics.value FROM runs"
                " JOIN tags AS parent ON parent.run_uuid = runs.run_uuid"
                "  AND parent.key = 'mlflow.parentRunId' AND parent.value = ?"
                " JOIN tags AS phase ON phase.run_uuid = runs.run_uuid"
                "  AND phase.key = 'haloformer.phase'"
                " JOIN metrics ON metrics.run_uuid = runs.run_uuid AND metrics.key = 'loss'"
                " ORDER BY metrics.step",
                (known.mlflow_id,),
            ).fetchall()

    def leftovers(self) -> list[int]:
        """Steps with files but no manifest."""

        def ask() -> list[int]:
            catalog = self._catalog()
            return sorted(set(catalog.steps()) - {entry.step for entry in catalog.committed()})

        return in_child(ask)

    def _catalog(self) -> Catalog:
        return Catalog(self.known.artifacts(), self.known.run_id)

    def _be_rank(
        self, rank: int, num_ranks: int, port: int, prepare: Callable[[int], None] | None
    ) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        sys.argv = ["worker", "--run-dir", str(self.run_dir.path)]
        sys.argv += ["--attempt", ATTEMPT, "--local_rank", str(rank)]
        log = (self.folder / "ranks.log").open("a")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if prepare is not None:
            prepare(rank)
        code = rank_main.main()
        if code:
            sys.exit(code)


def _wait_for(running: dict[int, int], victim: int | None) -> bool:
    """Wait for all ranks; when one ends badly, end the others, as the launcher does.

    The victim is left to die by itself, so that a fault of another rank is not taken for it.
    """
    status_of = {}
    while running:
        pid, status = os.wait()
        status_of[running.pop(pid)] = status
        if status != 0:
            for other, rank in running.items():
                if rank != victim:
                    os.kill(other, signal.SIGKILL)
    if victim is not None and status_of[victim] == signal.SIGKILL:
        return False
    assert set(status_of.values()) == {0}, f"ranks ended with {status_of}; see ranks.log"
    return True


def _split(content: bytes) -> tuple[Any, bytes]:
    """safetensors writes the keys of its header in an order of its own: compare it parsed."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]
