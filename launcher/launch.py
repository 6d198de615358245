"""Start the ranks with the stock DeepSpeed launcher, and stop them cleanly when asked."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from haloformer.launcher.environment import rank_environment
from haloformer.launcher.run_dir import RunDir

WORKER_MODULE = "haloformer.launcher.worker"


class LaunchError(ValueError):
    """The ranks cannot be started."""


def choose_port(wanted: int | None) -> int:
    """The port on which rank 0 listens for the others: the one wanted, or a free one.

    Raises:
        LaunchError: If the wanted port is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", 0 if wanted is None else wanted))
        except OSError as error:
            raise LaunchError(
                f"--master-port {wanted}: {error.strerror}; "
                "give another port, or none to take a free one"
            ) from error
        port: int = probe.getsockname()[1]
        return port


def launch_ranks(run_dir: RunDir, num_ranks: int, port: int) -> int:
    """Run the worker on ``num_ranks`` processes of this machine until they end.

    The first SIGINT, SIGTERM or SIGHUP asks the ranks to finish their step, write a checkpoint
    and end; a second one ends them at once.

    Returns:
        Exit code of the first rank that failed, 0 when all ended well.
    """
    # What the `deepspeed` command itself starts on one machine. Its own process would only work
    # out these arguments, and importing DeepSpeed once more costs 4 s of every start.
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *("--world_info", _world_info(num_ranks)),
        *("--master_addr", "127.0.0.1", "--master_port", str(port)),
        *("--log_level", "error", "--quiet", "--module"),
        WORKER_MODULE,
        *("--run-dir", str(run_dir.path)),
    ]
    # A session of its own: Ctrl-C in the terminal must not reach the runner, which would kill
    # the ranks in the middle of a step.
    runner = subprocess.Popen(
        command, env=rank_environment(num_ranks, os.environ), start_new_session=True
    )
    with _passing_on_signals(run_dir, runner):
        code = runner.wait()
    return code if code >= 0 else 128 - code


def _world_info(num_ranks: int) -> str:
    """Ranks per host, as DeepSpeed's launcher wants it: JSON in URL-safe base64."""
    hosts = {"localhost": list(range(num_ranks))}
    return base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()


@contextmanager
def _passing_on_signals(run_dir: RunDir, runner: subprocess.Popen[bytes]) -> Iterator[None]:
    asked = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            print(
                f"\n{signal.Signals(signum).name}: finishing the step and writing a checkpoint; "
                "once more ends the ranks at once",
                flush=True,
            )
        if not signal_ranks(run_dir, signal.SIGTERM if asked == 1 else signal.SIGKILL):
            runner.terminate()  # no rank is up yet: the runner has nothing to lose

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in handled}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def signal_ranks(run_dir: RunDir, signum: signal.Signals) -> bool:
    """Send a signal to every rank of this run that is alive; False when there was none."""
    sent = False
    for pid in run_dir.rank_pids().values():
        try:
            process = psutil.Process(pid)
            # The number may have gone to another program since.
            if WORKER_MODULE in process.cmdline():
                process.send_signal(signum)
                sent = True
        except psutil.NoSuchProcess:
            continue
    return sent
