"""`haloformer train` on real processes: whole, killed, stopped, resumed on another layout.

All on a blend of two corpora and in two phases: shorter sequences, narrower windows and more of
them first; then two at a time. A checkpoint stands exactly at the border, one inside the second.
"""

import os
import signal
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from haloformer.launcher.cli import main
from haloformer.launcher.run_dir import RunDir
from launcher_runs import (
    LIMIT_S,
    TINY,
    Started,
    haloformer,
    held_out,
    losses,
    newest_run,
    start,
    write_project,
)

RANKS = ["--ranks", "2"]
BLEND = [{"path": "data/train", "weight": 2}, {"path": "data/eval", "weight": 1}]
PHASES = [
    {"name": "short", "steps": 8, "seq_len": 64, "attention_window": 8, "global_batch": 8},
    {"name": "long", "steps": 16, "micro_batch": 2, "warmup_steps": 2},
]
# Phase -> its status in MLflow, and the steps whose loss its run has, each once.
TOLD = {"short": ("FINISHED", list(range(1, 9))), "long": ("FINISHED", list(range(9, 25)))}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    recipe = {**TINY, "phases": PHASES, "data": {**TINY["data"], "train": BLEND}}
    del recipe["steps"]  # the sum of the phases' is as good
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> tuple[dict[int, float], str]:
    """Losses and output of the run that nothing disturbs."""
    done = haloformer(project, ["train", "tiny.yaml", *RANKS])
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(newest_run(project)), done.stdout


def test_a_whole_run_learns_evaluates_checkpoints_and_says_what_next(
    project: Path, whole: tuple[dict[int, float], str]
) -> None:
    loss, output = whole
    run_dir = newest_run(project)
    assert sorted(loss) == list(range(1, 25))
    assert loss[24] < loss[1]
    assert "64 then 128 tokens" in output
    steps = [r for r in run_dir.read_metrics() if "loss" in r]
    assert all(0 <= r["data_seconds"] <= r["step_seconds"] for r in steps)
    lengths = {r["step"]: r["seq_len"] for r in steps}
    assert lengths == {step: 64 if step <= 8 else 128 for step in range(1, 25)}
    rates = {r["step"]: r["learning_rate"] for r in steps}
    assert rates[4] == max(rates[step] for step in range(1, 9))  # each phase warms up
    assert rates[10] == max(rates[step] for step in range(9, 25)) > rates[9] > rates[8]
    assert told_of_phases(project, run_dir) == TOLD
    evaluated = held_out(run_dir)
    assert sorted(evaluated) == [0, 8, 24]
    assert evaluated[24] < evaluated[0]
    for part in ("step 24, step 16", "mlflow ui --backend-store-uri sqlite:", "--resume"):
        assert part in output
    assert run_dir.curve_file.read_bytes().startswith(b"\x89PNG")
    assert run_dir.read_state() == ("finished", 24)
    listed = haloformer(project, ["checkpoints", "latest", "--verify"])
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[1] for line in listed.stdout.splitlines()] == ["24", "16"]


def test_kill_9_of_a_rank_then_resume_gives_the_same_losses_bit_for_bit(
    project: Path, whole: tuple[dict[int, float], str]
) -> None:
    started = start(project, ["train", "tiny.yaml", *RANKS])
    run_dir = started.wait_for_step(11)
    os.kill(run_dir.rank_pids()[1], signal.SIGKILL)
    code, output = started.finish()
    assert code == 1
    assert "failed" in output and "--resume" in output
    assert max(losses(run_dir)) < 24, "the run ended before it was killed"
    unlike = ["data.prefetch=0", "data.workers=2"]  # neither changes a batch
    done = haloformer(project, ["train", "tiny.yaml", *unlike, *RANKS, "--resume", "latest"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 8" in done.stdout or "from step 16" in done.stdout
    assert losses(run_dir) == whole[0]
    assert told_of_phases(project, run_dir) == TOLD


def test_ctrl_c_on_tensor_ranks_then_one_rank_then_tensor_ranks_keeps_the_losses(
    project: Path,
    whole: tuple[dict[int, float], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tensor 2, tensor 1, tensor 2 in one run, against the context-parallel run left alone."""
    tensor = ["parallel.context=1", "parallel.tensor=2"]
    single = ["parallel.context=1", "parallel.zero_stage=3", "--ranks", "1"]
    started = start(project, ["train", "tiny.yaml", *tensor, *RANKS])
    run_dir = started.wait_for_step(4)
    first = interrupt(started, run_dir)
    assert 4 <= first < 20
    resume = ["--resume", run_dir.path.name]
    started = start(project, ["train", "tiny.yaml", *single, *resume])
    started.wait_for_step(first + 2, run_dir)
    second = interrupt(started, run_dir)
    assert first + 2 <= second < 24
    command = ["train", "tiny.yaml", *tensor, "parallel.zero_stage=2", *RANKS, *resume]
    done = haloformer(project, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks (context 1, tensor 2), ZeRO-2" in done.stdout
    assert f"from step {second}" in done.stdout
    resumed = losses(run_dir)
    assert resumed.keys() == whole[0].keys()
    for step, loss in whole[0].items():
        assert resumed[step] == pytest.approx(loss, rel=1e-6), step
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["checkpoints", run_dir.path.name, "--verify"]) == 0
    newest = capsys.readouterr().out.splitlines()[0]
    assert "step 24" in newest and "context 1 x tensor 2, ZeRO-2, fp32  verified" in newest


@pytest.mark.parametrize("heard", [True, False])
def test_ctrl_c_before_the_ranks_are_up_ends_the_run_as_stopped(project: Path, heard: bool) -> None:
    started = start(project, ["train", "tiny.yaml", *RANKS])
    announced = started.process.stdout.readline()
    if not heard:  # `| tee log` was ended by the same Ctrl-C
        started.process.stdout.close()
    started.process.send_signal(signal.SIGINT)
    code, output = started.finish() if heard else (started.process.wait(LIMIT_S), "")
    assert code == 0, announced + output
    if heard:
        assert "stopped before its first step" in output and "Traceback" not in output
        assert "--resume" not in output.split("once more ")[-1]
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert client.get_run(started.run_dir().path.name).info.status == "KILLED"


def told_of_phases(project: Path, run_dir: RunDir) -> dict[str, tuple[str, list[int]]]:
    """What MLflow knows of the phases of a run; of the run itself it knows every step once."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    run = client.get_run(run_dir.path.name)
    assert sorted(m.step for m in client.get_metric_history(run.info.run_id, "loss")) == list(
        range(1, 25)
    )
    wanted = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    children = client.search_runs([run.info.experiment_id], wanted)
    seen = {}
    for child in children:
        history = client.get_metric_history(child.info.run_id, "loss")
        seen[child.info.run_name] = (child.info.status, sorted(m.step for m in history))
    assert len(seen) == len(children)
    return seen


def interrupt(started: Started, run_dir: RunDir) -> int:
    """Ctrl-C; the step at which the run stopped, with a checkpoint."""
    started.process.send_signal(signal.SIGINT)
    code, output = started.finish()
    assert code == 0, output
    state = run_dir.read_state()
    assert state is not None and state[0] == "stopped", output
    assert f"stopped after step {state[1]}" in output
    return state[1]


def test_a_changed_recipe_is_not_continued(
    project: Path, whole: tuple[dict[int, float], str]
) -> None:
    done = haloformer(
        project, ["train", "tiny.yaml", "seed=4", "phases.1.steps=22", *RANKS, "--resume", "latest"]
    )
    assert done.returncode == 2
    assert "seed was 3, is 4" in done.stderr
    assert "steps" not in done.stderr.split("changed: ")[1].split(";")[0]
