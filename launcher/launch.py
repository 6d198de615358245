"""Start the ranks of one machine with DeepSpeed's launcher, and signal ranks by process id."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from random import SystemRandom

import psutil

from haloformer.launcher.cluster import Answers, Meeting
from haloformer.launcher.environment import rank_environment
from haloformer.launcher.hosts import Host
from haloformer.launcher.run_dir import RunDir

WORKER_MODULE = "haloformer.launcher.worker"
SLURM_TASK_MODULE = "haloformer.launcher.slurm_task"

# Rank 0 listens seconds after its port was chosen. Linux gives ports from 32768 up to whoever does
# not ask for a number, every connection of every program, so one of those could be gone by then.
_PORTS = range(20_000, 32_768)


class LaunchError(ValueError):
    """The ranks cannot be started."""


class LocalCluster:
    """This machine."""

    def __init__(self, num_ranks: int, port: int | None) -> None:
        """Describe it.

        Args:
            num_ranks: Processes that it may run.
            port: On which rank 0 listens, None for a free one.
        """
        self.hosts, self._port = (Host("localhost", num_ranks),), port

    def check(self, used: Sequence[Host]) -> None:
        """See that the port is free.

        Raises:
            LaunchError: If it is not.
        """
        choose_port(self._port)

    def answering(self) -> Answers:
        """This machine, always."""
        return Answers(self.hosts, {})

    def meeting(self, used: Sequence[Host]) -> Meeting:
        """The loopback interface."""
        return Meeting("127.0.0.1", choose_port(self._port))

    def start(
        self, run_dir: RunDir, attempt: str, used: Sequence[Host], meeting: Meeting
    ) -> subprocess.Popen[bytes]:
        """Start what the `deepspeed` command itself starts on one machine.

        Its own process would only work out these arguments, and importing DeepSpeed once more
        costs 4 s of every start.
        """
        (host,) = used
        command = [
            *(sys.executable, "-m", "deepspeed.launcher.launch"),
            *("--world_info", _world_info(host.slots)),
            *("--master_addr", meeting.address, "--master_port", str(meeting.port)),
            *("--log_level", "error", "--quiet", "--module"),
            *worker_command(run_dir, attempt),
        ]
        # A session of its own: Ctrl-C in the terminal must not reach the runner, which would kill
        # the ranks in the middle of a step.
        return subprocess.Popen(
            command, env=rank_environment(host.slots, os.environ), start_new_session=True
        )

    def ask_stop(self, run_dir: RunDir, runner: subprocess.Popen[bytes]) -> None:
        """Signal the ranks, or end the runner when there are none yet: it has nothing to lose."""
        if not signal_ranks(run_dir, signal.SIGTERM):
            runner.terminate()

    def look(
        self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]
    ) -> dict[str, set[int] | None]:
        """Which ranks are alive."""
        return {host: alive_ranks(run_dir, numbers) for host, numbers in ranks.items()}

    def end(self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]) -> None:
        """Kill the ranks."""
        signal_ranks(run_dir, signal.SIGKILL)


def worker_command(run_dir: RunDir, attempt: str) -> list[str]:
    """The worker module and its arguments, as every launcher ends its command."""
    return [WORKER_MODULE, "--run-dir", str(run_dir.path), "--attempt", attempt]


def choose_port(wanted: int | None, address: str = "127.0.0.1") -> int:
    """The port on which rank 0 listens for the others: the one wanted, or a free one.

    Raises:
        LaunchError: If the wanted port is taken.
    """
    candidates = SystemRandom().sample(_PORTS, 100) if wanted is None else [wanted]
    for port in candidates:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # Connections of an earlier start, closed a moment ago, do not keep the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                fault = str(error.strerror)
                continue
            return port
    if wanted is None:
        raise LaunchError(
            f"no free port found from {_PORTS.start} to {_PORTS.stop - 1} ({fault}); "
            "give one with --master-port"
        )
    raise LaunchError(
        f"--master-port {wanted}: {fault}; give another port, or none to take a free one"
    )


def alive_ranks(run_dir: RunDir, among: Container[int] | None = None) -> set[int]:
    """Ranks of this run that are processes of this machine."""
    return set(_processes(run_dir, among))


def signal_ranks(
    run_dir: RunDir, signum: signal.Signals, among: Container[int] | None = None
) -> bool:
    """Send a signal to every rank of this run that is alive; False when there was none."""
    sent = False
    for process in _processes(run_dir, among).values():
        try:
            process.send_signal(signum)
            sent = True
        except psutil.NoSuchProcess:
            continue
    return sent


def _processes(run_dir: RunDir, among: Container[int] | None) -> dict[int, psutil.Process]:
    found = {}
    for rank, pid in run_dir.rank_pids().items():
        if among is not None and rank not in among:
            continue
        try:
            process = psutil.Process(pid)
            # The number may have gone to another program since, or to a rank of another run, and a
            # dead one whose parent has not looked is a zombie, with no command line.
            words = process.cmdline()
            is_rank = not {WORKER_MODULE, SLURM_TASK_MODULE}.isdisjoint(words)
            if is_rank and str(run_dir.path) in words:
                found[rank] = process
        except psutil.NoSuchProcess:
            continue
    return found


def _world_info(num_ranks: int) -> str:
    """Ranks per host, as DeepSpeed's launcher wants it: JSON in URL-safe base64."""
    hosts = {"localhost": list(range(num_ranks))}
    return base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
