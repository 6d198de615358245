"""Runs are asked to stop, and ranks end, also when nobody reads what they say."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from haloformer.launcher.attempt import StopSignals, run_attempt
from haloformer.launcher.launch import LocalCluster
from haloformer.launcher.run_dir import Orders, Plan, RunDir


def test_a_terminal_that_is_closed_asks_to_stop_and_takes_nothing_down() -> None:
    program = (
        "import time\n"
        "from haloformer.launcher.attempt import StopSignals\n"
        "asked = []\n"
        "with StopSignals() as signals:\n"
        "    signals.on_first = lambda: asked.append(True)\n"
        "    print('up', flush=True)\n"
        "    while not asked:\n"
        "        time.sleep(0.01)\n"
        "    print('the report of the run', flush=True)\n"
        "raise SystemExit(7)\n"
    )
    ours, theirs = pty.openpty()
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may be nohup's
    )
    os.close(theirs)
    try:
        assert os.read(ours, 100).startswith(b"up")
        os.close(ours)
        launcher.send_signal(signal.SIGHUP)  # as the shell does, and writing now fails
        assert launcher.wait(timeout=60) == 7
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(("before", "stays"), [(signal.SIG_IGN, True), (signal.SIG_DFL, False)])
def test_nohup_keeps_a_run_going(before: signal.Handlers, stays: bool) -> None:
    old = signal.signal(signal.SIGHUP, before)
    try:
        with StopSignals():
            assert (signal.getsignal(signal.SIGHUP) is before) == stays
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_rank_whose_start_is_over_ends_though_nobody_hears_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.write_orders(Orders("the next", stop=False))
    program = (
        "from pathlib import Path\n"
        "from haloformer.launcher.pulse import Pulse\n"
        "from haloformer.launcher.run_dir import RunDir\n"
        "input()\n"
        f"Pulse(RunDir(Path({str(tmp_path)!r})), 0, 'this one', lambda: None).start()\n"
        "raise SystemExit(7)\n"
    )
    hears, said = os.pipe()
    rank = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=said)
    os.close(said)
    os.close(hears)
    rank.communicate(b"go on\n", timeout=60)
    assert rank.returncode == 1


class LosingItsFolder(LocalCluster):
    """Its runner runs; then the orders can no longer be written, and it is asked to end at once."""

    def __init__(self, signals: StopSignals) -> None:
        super().__init__(1, None)
        self._signals = signals

    def start(self, run_dir, attempt, used, meeting) -> subprocess.Popen[bytes]:
        (run_dir.path / "orders.json").unlink()
        (run_dir.path / "orders.json").mkdir()
        self._signals.count = 2
        self.runner = subprocess.Popen(["sleep", "60"])
        return self.runner


def test_the_runner_is_ended_though_the_orders_cannot_be_written(tmp_path: Path) -> None:
    signals, plan = StopSignals(), Plan("", "", "", {}, 1, None)
    cluster = LosingItsFolder(signals)
    with pytest.raises(IsADirectoryError):
        run_attempt(cluster, RunDir(tmp_path), plan, cluster.hosts, signals)
    assert cluster.runner.poll() == -signal.SIGKILL
