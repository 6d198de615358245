"""Supervision: what is tried again, on what, and when it is given up."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from faults.hosts import why_not
from haloformer.configs.load import ConfigError, parse_config
from haloformer.configs.schema import TrainConfig
from haloformer.launcher.attempt import Ending, StopSignals
from haloformer.launcher.hosts import fill, num_slots
from haloformer.launcher.run_dir import Plan, RunDir
from haloformer.launcher.supervise import Job, choose_layout, supervise
from launcher_runs import TINY, haloformer, losses, newest_run, start, write_project
from toy_ranks import ToyCluster


def recipe(context: int, tensor: int, global_batch: int, micro_batch: int = 1) -> TrainConfig:
    parallel = {"context": context, "tensor": tensor}
    batch = {"global_batch": global_batch, "micro_batch": micro_batch}
    raw = {**TINY, "parallel": parallel, "batch": batch}
    raw["model"] = {**TINY["model"], "num_heads": 4, "dilation": [1, 1, 2, 2]}
    return parse_config(raw, "test")


@pytest.mark.parametrize(
    ("context", "tensor", "batch", "slots", "chosen"),
    [
        # The recipe's own sizes while they fit, as many data ranks as divide the batch.
        (1, 1, 4, 4, (4, 1, 1)),
        (1, 1, 4, 3, (2, 1, 1)),
        (1, 1, 6, 5, (3, 1, 1)),
        (1, 1, 7, 6, (1, 1, 1)),
        (2, 1, 4, 8, (4, 2, 1)),
        (2, 1, 4, 7, (2, 2, 1)),
        (2, 2, 4, 15, (2, 2, 2)),
        (2, 1, 4, 3, (1, 2, 1)),  # 2 of 3 slots: a context of 1 would need more memory
        # Too few slots for one sequence: the divisors that use the most of them.
        (2, 1, 4, 1, (1, 1, 1)),
        (4, 1, 4, 3, (1, 2, 1)),
        (2, 2, 4, 3, (1, 1, 2)),  # 2 ranks at most: the larger tensor size of three ways
        (2, 2, 4, 2, (1, 1, 2)),
        (4, 2, 4, 6, (1, 2, 2)),  # 4 ranks at most
        (4, 2, 6, 6, (3, 1, 2)),
        (3, 1, 4, 2, (2, 1, 1)),
    ],
)
def test_the_largest_layout_that_divides_the_batch(
    context: int, tensor: int, batch: int, slots: int, chosen: tuple[int, int, int]
) -> None:
    assert choose_layout(recipe(context, tensor, batch), slots) == chosen


def test_a_micro_batch_that_nothing_divides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 3 ranks .*global_batch 4 .*micro_batch 3"):
        choose_layout(recipe(1, 1, 4, micro_batch=3), 3)


@dataclass(frozen=True)
class ToyJob(Job):
    """A job whose checkpoints are what the test says, one answer per question."""

    steps: list[int | None] = field(default_factory=list)

    def newest_step(self) -> int | None:
        return self.steps.pop(0)


class Supervised:
    """A run of toy ranks: what was said, where the ranks started, how it ended."""

    def __init__(self, folder: Path, cluster: ToyCluster, steps: list[int | None]) -> None:
        self.cluster, self.said = cluster, []
        self.run_dir = RunDir(folder)
        config = recipe(1, 1, 4)
        used = fill(cluster.hosts, num_slots(cluster.hosts))
        values = config.model_dump(mode="json")
        plan = Plan("run", "sqlite:///none.db", "none", values, len(used), None)
        self.job = ToyJob(None, cluster, self.run_dir, plan, config, used, 0.0, steps)

    def run(self, signals: StopSignals | None = None) -> Ending:
        return supervise(self.job, signals or StopSignals(), self.said.append)


def test_a_killed_rank_is_started_again_on_the_same_hosts_from_the_newest_checkpoint(
    tmp_path: Path,
) -> None:
    cluster = ToyCluster(["a", "b"], [["die", "die"], ["finish", "finish"]])
    run = Supervised(tmp_path, cluster, [8])
    ending = run.run()
    assert ending.code == 0 and ending.describe() == "finished"
    assert cluster.started == [["a", "b"], ["a", "b"]]
    assert run.said[0] == "rank 0 on a was killed"
    assert "from step 8 with 2 ranks (data 2, context 1, tensor 1)" in run.said[1]
    plan = run.run_dir.read_plan()
    assert plan.resume_step == 8 and plan.world_size == 2


def test_a_host_that_does_not_answer_is_dropped_and_comes_back_when_it_does(
    tmp_path: Path,
) -> None:
    script = [["crash", "die"], ["die"], ["finish", "finish"]]
    cluster = ToyCluster(["a", "b"], script, lost=[{"b"}, set()])
    run = Supervised(tmp_path, cluster, [8, 16])
    assert run.run().code == 0
    assert cluster.started == [["a", "b"], ["a"], ["a", "b"]]
    assert "dropped b: it does not answer" in run.said
    assert any("from step 8 with 1 rank " in line for line in run.said)


def test_it_is_given_up_after_three_tries_without_a_newer_checkpoint(tmp_path: Path) -> None:
    cluster = ToyCluster(["a"], [["crash"]] * 9)
    run = Supervised(tmp_path, cluster, [None, 8, 8, 8, 8])
    ending = run.run()
    assert ending.code == 1
    assert ending.describe() == (
        "failed: 3 tries in a row without a newer checkpoint (the newest is of step 8); "
        "the last: rank 0 failed with exit code 1"
    )
    assert len(cluster.started) == 5


def test_a_checkpoint_that_is_written_again_and_again_is_no_progress(tmp_path: Path) -> None:
    """Each time the newest one turns out to be damaged."""
    cluster = ToyCluster(["a"], [["crash"]] * 9)
    assert Supervised(tmp_path, cluster, [8, 4, 8, 4]).run().code == 1
    assert len(cluster.started) == 4


def test_what_the_user_has_to_correct_is_not_tried_again(tmp_path: Path) -> None:
    cluster = ToyCluster(["a", "b"], [["refuse", "crash"]])
    ending = Supervised(tmp_path, cluster, []).run()
    assert ending.code == 2 and "rank 0 on a failed with exit code 2" in ending.describe()
    assert len(cluster.started) == 1


def test_a_host_that_is_taken_away_politely_does_not_end_the_run(tmp_path: Path) -> None:
    """Its ranks got SIGTERM, so all wrote a checkpoint and stopped; nobody asked the launcher."""
    cluster = ToyCluster(["a", "b"], [["leave", "leave"], ["finish"]], lost=[{"b"}])
    run = Supervised(tmp_path, cluster, [10])
    assert run.run().describe() == "finished"
    assert cluster.started == [["a", "b"], ["a"]]


def test_no_host_left_ends_the_run_after_a_while(tmp_path: Path) -> None:
    cluster = ToyCluster(["a"], [["crash"]], lost=[{"a"}])
    run = Supervised(tmp_path, cluster, [8])
    assert run.run().describe() == "failed: no host answers any more"
    assert run.said.count("dropped a: it does not answer") == 3


def test_sigterm_stops_all_ranks_after_their_step_and_nothing_starts_again(
    tmp_path: Path,
) -> None:
    cluster = ToyCluster(["a", "b"], [["obey", "obey"]])
    run = Supervised(tmp_path, cluster, [])
    term = partial(os.kill, os.getpid(), signal.SIGTERM)
    with StopSignals() as signals, when_up(run.run_dir, 2, term):
        ending = run.run(signals)
    assert ending.code == 0 and ending.describe() == "stopped after step 10"


@pytest.mark.parametrize(
    ("step", "said"), [(None, "stopped before its first step"), (8, "stopped after step 8")]
)
def test_a_stop_before_the_ranks_are_up_is_no_failure(tmp_path: Path, step, said) -> None:
    cluster = ToyCluster(["a", "b"], [["late", "late"]] * 2)
    run = Supervised(tmp_path, cluster, [])
    run.job = replace(run.job, plan=replace(run.job.plan, resume_step=step))
    assert run.job.attempt(StopSignals()).describe() == "failed: the ranks did not start"
    interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
    begin = cluster.start

    def start(*args):
        interrupt()
        return begin(*args)

    with StopSignals() as signals:
        cluster.start = start
        ending = run.run(signals)
        assert ending.code == 0 and ending.describe() == said
        assert run.run(signals) == ending  # asked before: none is started
    assert len(cluster.started) == 2


def test_a_second_signal_ends_ranks_that_hang_at_once(tmp_path: Path) -> None:
    cluster = ToyCluster(["a", "b"], [["hang", "hang"]])
    run = Supervised(tmp_path, cluster, [])

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with StopSignals() as signals, when_up(run.run_dir, 2, twice):
        ending = run.run(signals)
    assert ending.code == 1 and ending.describe() == "failed: ended at once, as asked"
    assert not any(Path(f"/proc/{pid}").exists() for pid in run.run_dir.rank_pids().values())


def test_a_rank_that_starts_when_its_attempt_is_over_ends_itself(tmp_path: Path) -> None:
    """Its host was cut off, or slow, while the others went on without it."""
    cluster = ToyCluster(["a"], [["finish"]])
    run = Supervised(tmp_path, cluster, [])
    assert run.run().code == 0
    pids = run.run_dir.rank_pids()
    late = subprocess.run(
        [sys.executable, sys.modules["toy_ranks"].__file__, str(tmp_path), "old", "hang", "0"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert late.returncode == 1
    assert "rank 0: this start of the run is over" in late.stderr
    assert run.run_dir.rank_pids() == pids


@pytest.mark.skipif(why_not() is None, reason="tests/launcher/test_hosts.py does it on two hosts")
def test_a_real_run_whose_rank_is_killed_ends_with_the_losses_of_one_left_alone(
    tmp_path: Path,
) -> None:
    write_project(tmp_path)
    command = ["train", "tiny.yaml", "--ranks", "2"]
    assert haloformer(tmp_path, command).returncode == 0
    whole = losses(newest_run(tmp_path))
    started = start(tmp_path, [*command, "--supervise"])
    run_dir = started.wait_for_step(11)
    os.kill(run_dir.rank_pids()[1], signal.SIGKILL)
    code, output = started.finish()
    assert code == 0, output
    assert "supervisor: rank 1 was killed" in output
    assert losses(run_dir) == whole


@contextlib.contextmanager
def when_up(run_dir: RunDir, num_ranks: int, call: Callable[[], None]) -> Iterator[None]:
    """Call a function as soon as so many ranks beat."""
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.02):
            if len(list((run_dir.path / "ranks").glob("*.beat"))) == num_ranks:
                call()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
