"""Ports, environment, and signals that reach only ranks of ours."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from haloformer.launcher.environment import rank_environment
from haloformer.launcher.launch import (
    SLURM_TASK_MODULE,
    WORKER_MODULE,
    LaunchError,
    alive_ranks,
    choose_port,
    signal_ranks,
)
from haloformer.launcher.run_dir import RunDir
from ports import port_of_our_own


def test_a_taken_port_is_refused_by_number() -> None:
    port = port_of_our_own()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(LaunchError, match=f"--master-port {port}: Address already in use"),
    ):
        choose_port(port)
    assert choose_port(port) == port


def test_a_free_port_can_be_bound_and_is_none_that_linux_gives_away() -> None:
    port = choose_port(None)
    with socket.create_server(("127.0.0.1", port)):
        pass
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists():  # the ranks listen seconds later
        assert port < int(given.read_text().split()[0])


def test_ranks_share_the_cores_and_what_the_user_set_stays() -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(cores * 2, {})["OMP_NUM_THREADS"] == "1"
    assert rank_environment(1, {})["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(1, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("words", [[], [WORKER_MODULE, "--run-dir", "/another/run"]])
def test_a_process_that_took_over_a_rank_s_number_is_not_signalled(tmp_path: Path, words) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    command = [sys.executable, "-c", "print(flush=True); input()", *words]
    stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert stranger.stdout is not None and stranger.stdout.readline()
        (tmp_path / "ranks" / "0.pid").write_text(str(stranger.pid))
        assert not signal_ranks(run_dir, signal.SIGKILL)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.communicate()


def test_no_rank_to_signal_is_said(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "ranks" / "0.pid").write_text(str(gone.pid))
    assert not signal_ranks(run_dir, signal.SIGTERM)


@pytest.mark.parametrize("module", [WORKER_MODULE, SLURM_TASK_MODULE])
def test_a_rank_is_seen_and_ended_however_it_was_started(tmp_path: Path, module: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    program = "print(flush=True); input()"
    rank = subprocess.Popen(
        [sys.executable, "-c", program, module, "--run-dir", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        # A process that has just begun has no command line yet; a rank's number comes from itself.
        assert rank.stdout is not None and rank.stdout.readline()
        (tmp_path / "ranks" / "3.pid").write_text(str(rank.pid))
        assert alive_ranks(run_dir) == {3}
        assert alive_ranks(run_dir, [2]) == set()
        assert signal_ranks(run_dir, signal.SIGKILL, [3])
        assert rank.wait() == -signal.SIGKILL
        assert alive_ranks(run_dir) == set()
    finally:
        rank.kill()
        rank.communicate()
