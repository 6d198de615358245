"""Training on several real hosts: ssh, the stock pdsh runner, cables that are pulled.

The hosts are network namespaces (tests/faults/hosts.py); one of a kind of failure each.
"""

import os
import signal
from pathlib import Path

import pytest

from faults.hosts import Network, hosts, why_not
from haloformer.launcher.launch import alive_ranks
from haloformer.launcher.run_dir import RunDir
from launcher_runs import (
    Started,
    haloformer,
    losses,
    newest_run,
    runs_of,
    start,
    write_project,
)

REASON = why_not()
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

RECIPE = ["train", "tiny.yaml", "steps=48"]
ONE_EACH = [*RECIPE, "batch.global_batch=6", "parallel.context=1", "parallel.zero_stage=3"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> dict[int, float]:
    """Losses of 2 ranks on one host that nothing disturbs."""
    done = haloformer(project, [*RECIPE, "--ranks", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(newest_run(project))


@pytest.fixture(scope="module")
def network(project: Path, tmp_path_factory: pytest.TempPathFactory):
    with hosts(["alpha", "beta"], tmp_path_factory.mktemp("network")) as network:
        network.write_hostfile(project / "hosts")
        yield network


def test_a_run_stopped_killed_and_cut_off_has_the_losses_of_one_left_alone_on_one_host(
    project: Path, whole: dict[int, float], network: Network
) -> None:
    """Ctrl-C; then, supervised: a rank of one host killed, the cable of the other pulled."""
    command = [*RECIPE, "--hostfile", "hosts"]
    started = start(project, command, network.environment)
    run_dir = started.wait_for_step(3)
    stopped_at = interrupt(started, run_dir)
    resume = ["--supervise", "--resume", run_dir.path.name]
    started = start(project, [*command, *resume], network.environment)
    started.wait_for_step(stopped_at + 1, run_dir)
    first = run_dir.rank_pids()
    os.kill(first[1], signal.SIGKILL)
    second = started.wait_for_ranks(run_dir, first)
    cut_at = max(losses(run_dir)) + 1
    started.wait_for_step(cut_at, run_dir)
    try:
        network.cut("alpha")  # rank 0 and the meeting point are there
        code, output = started.finish()
    finally:
        network.mend("alpha")
    assert code == 0, output
    for part in (
        f"2 ranks on 2 hosts (context 2, tensor 1), ZeRO-1, fp32; run {run_dir.path.name} "
        f"from step {stopped_at}",
        "supervisor: rank 1 on beta was killed",
        "with 2 ranks (data 1, context 2, tensor 1)",
        "supervisor: alpha did not answer",
        "supervisor: dropped alpha",
        "with 1 rank (data 1, context 1, tensor 1)",
    ):
        assert part in output, output
    assert "Traceback" not in output, "one line from each rank that only lost another"
    assert not any(Path(f"/proc/{pid}").exists() for pid in [*first.values(), *second.values()])
    assert run_dir.read_state() == ("finished", 48)
    loss = losses(run_dir)
    assert loss == pytest.approx(whole, rel=1e-6)
    alike = {step for step in whole if step <= stopped_at}
    assert {step: loss[step] for step in alike} == {step: whole[step] for step in alike}


def interrupt(started: Started, run_dir: RunDir) -> int:
    """Ctrl-C; the step at which the run stopped, on all hosts."""
    started.process.send_signal(signal.SIGINT)
    code, output = started.finish()
    assert code == 0, output
    state = run_dir.read_state()
    assert state is not None and state[0] == "stopped" and state[1] < 40, output
    assert alive_ranks(run_dir) == set()
    return state[1]


def test_hosts_that_cannot_take_part_are_named_before_anything_starts(
    project: Path, network: Network
) -> None:
    (project / "more_hosts").write_text("alpha slots=1\ngamma slots=1\n")
    before = runs_of(project)
    command = [*RECIPE, "--hostfile", "more_hosts"]
    done = haloformer(project, command, network.environment)
    assert done.returncode == 2, done.stdout
    assert "host gamma does not answer" in done.stderr and "alpha" not in done.stderr
    assert runs_of(project) == before


def test_doctor_looks_at_every_host_and_names_the_one_that_is_away(
    project: Path, network: Network
) -> None:
    (project / "more_hosts").write_text("alpha slots=1\nbeta slots=2\ngamma slots=1\n")
    well = haloformer(project, ["doctor", "--hostfile", "hosts"], network.environment)
    assert well.returncode == 0, well.stdout + well.stderr
    for name, address in network.addresses.items():
        row = next(line for line in well.stdout.splitlines() if f"ok    {name}" in line)
        for part in (address, "slots=1", "GiB free", "clock", "deepspeed 0.19.8", "torch 2."):
            assert part in row
    sick = haloformer(project, ["doctor", "--hostfile", "more_hosts"], network.environment)
    assert sick.returncode == 2
    assert "FAIL  gamma" in sick.stdout and "it does not answer" in sick.stdout
    assert "1 to put right" in sick.stdout


@pytest.mark.extended
def test_without_supervision_a_host_cut_off_is_named_and_the_run_ends(
    project: Path, network: Network
) -> None:
    started = start(project, [*RECIPE, "--hostfile", "hosts"], network.environment)
    run_dir = started.wait_for_step(9)
    try:
        network.cut("beta")
        code, output = started.finish()
    finally:
        network.mend("beta")
    assert code == 1
    assert "beta did not answer" in output and "--resume" in output
    assert alive_ranks(run_dir) == set()


@pytest.mark.extended
def test_three_hosts_become_two_and_the_losses_stay(project: Path, tmp_path: Path) -> None:
    done = haloformer(project, [*ONE_EACH, "--ranks", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
    whole = losses(newest_run(project))
    with hosts(["one", "two", "three"], tmp_path, second=True) as network:
        hostfile = network.write_hostfile(tmp_path / "hosts")
        command = [*ONE_EACH, "--hostfile", str(hostfile), "--supervise"]
        started = start(project, command, network.environment)
        run_dir = started.wait_for_step(9)
        network.cut("two")
        code, output = started.finish()
    assert code == 0, output
    assert "with 2 ranks (data 2, context 1, tensor 1)" in output
    assert losses(run_dir) == pytest.approx(whole, rel=1e-6)
