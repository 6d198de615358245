"""Training inside SLURM: what it says of an allocation, and a job on a real one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.slurm import slurm, why_not
from haloformer.launcher.cli import main
from haloformer.launcher.hosts import Host, HostsError
from haloformer.launcher.slurm import SlurmCluster, tasks_per_node
from launcher_runs import LIMIT_S, haloformer, losses, newest_run, runs_of, write_project

ROOT = Path(__file__).parents[2]
REASON = why_not()


def test_tasks_per_node_are_spelled_out() -> None:
    assert tasks_per_node("4(x2),3,1(x3)") == [4, 4, 3, 1, 1, 1]
    with pytest.raises(HostsError, match=r"'4\(y2\)' is not of the form"):
        tasks_per_node("4(y2)")


def test_ranks_that_do_not_divide_over_the_hosts_are_refused_before_a_run_is_made(
    tmp_path: Path,
) -> None:
    hosts = (Host("a", 2), Host("b", 1))
    with pytest.raises(HostsError, match="as many ranks on every host"):
        SlurmCluster(hosts, tmp_path, None, None).check(hosts)


def test_outside_an_allocation_it_says_what_to_submit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert main(["train", "enwiki_mlm", "--launcher", "slurm"]) == 2
    assert "submit configs/slurm/haloformer.sbatch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "code", "requeued"),
    [
        ("trap 'exit 0' TERM", 0, True),  # a checkpoint was written
        ("trap 'sleep 0.5; exit 0' TERM", 0, True),  # that took a while
        ("true", 143, True),  # SIGTERM came before there was anything to write
        ("trap 'exit 1' TERM", 1, False),
    ],
)
def test_a_preempted_job_is_put_back_into_the_queue(tmp_path, launcher, code, requeued) -> None:
    """The script with a launcher and a scontrol that only do what it has to cope with."""
    stand_in, control, queue = (tmp_path / name for name in ("haloformer", "scontrol", "queue"))
    stand_in.write_text(f"#!/bin/bash\n{launcher}\necho up\nwhile :; do sleep 0.05; done\n")
    control.write_text(f'#!/bin/bash\necho "$@" > {queue}\n')
    for file in (stand_in, control):
        file.chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(ROOT / "configs" / "slurm" / "haloformer.sbatch"), "recipe.yaml"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HALOFORMER": str(stand_in),
            "SLURM_JOB_ID": "7",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert queue.exists() == requeued
    assert not requeued or queue.read_text() == "requeue 7\n"


@pytest.mark.root
@pytest.mark.extended
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_preempted_job_queues_again_and_ends_with_the_losses_of_a_run_left_alone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_project(tmp_path)
    recipe = ["tiny.yaml", "steps=60"]
    assert haloformer(tmp_path, ["train", *recipe, "--ranks", "2"]).returncode == 0
    whole, before = losses(newest_run(tmp_path)), runs_of(tmp_path)
    with slurm(tmp_path_factory.mktemp("slurm")) as variables:
        environment = {
            **{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
            **variables,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HALOFORMER": str(Path(sys.executable).with_name("haloformer")),
        }

        def call(*words: str) -> str:
            done = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{words}: {done.stderr}"
            return done.stdout

        script = ROOT / "configs" / "slurm" / "haloformer.sbatch"
        options = ["--parsable", "--ntasks-per-node=2", "--output=job.log", "--overcommit"]
        job = call("sbatch", *options, str(script), *recipe).strip()

        def said() -> str:
            log = tmp_path / "job.log"
            return f"{call('scontrol', 'show', 'job', job)}\n{log.read_text()}"

        def wait_for(what: str, reached) -> None:
            deadline = time.monotonic() + 2 * LIMIT_S
            while not reached():
                assert time.monotonic() < deadline, f"no {what}: {said()}"
                time.sleep(0.1)  # a poll interval; nothing depends on its length

        def step() -> int:
            new = runs_of(tmp_path) - before
            return max((max(losses(newest_run(tmp_path)), default=0) for _ in new), default=0)

        wait_for("step 5", lambda: step() >= 5)
        call("scancel", "--signal=TERM", "--batch", job)  # as --signal=B:TERM@120 does
        wait_for("requeue", lambda: "Restarts=1" in call("scontrol", "show", "job", job))
        call("scontrol", "update", f"jobid={job}", "starttime=now")  # SLURM waits two minutes
        wait_for("end", lambda: "JobState=COMPLETED" in call("scontrol", "show", "job", job))
        log = said()
    assert "stopped after step" in log and "finished" in log
    assert "supervisor:" not in log, "all ranks were seen alive"
    run_dir = newest_run(tmp_path)
    assert len(runs_of(tmp_path) - before) == 1, "the job came back to its own run"
    assert losses(run_dir) == whole
