"""One start of the ranks, watched to its end. Plain and supervised runs are made of these."""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Self

import psutil

from haloformer.launcher.cluster import Cluster
from haloformer.launcher.hosts import Host, ranks_of
from haloformer.launcher.progress import to_whoever_reads
from haloformer.launcher.run_dir import Orders, Plan, RunDir, State
from haloformer.launcher.watch import Fault, Watch

_POLL_S = 0.3
# A rank whose attempt is over ends itself within a beat, then its runner does.
_LEAVE_S = 8.0

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP while ranks run: the first asks them to stop, the next ends them.

    Use as a context; it may stay open over several attempts. Under nohup SIGHUP stays ignored.

    Args:
        promise: What ranks that are asked to stop do, for the user.
    """

    def __init__(self, promise: str = "finishing the step and writing a checkpoint") -> None:
        self._promise = promise
        self.count = 0
        self.on_first: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        handled = set(_HANDLED)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            handled.remove(signal.SIGHUP)
        self._before = {signum: signal.signal(signum, self._handle) for signum in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            name = signal.Signals(signum).name
            with to_whoever_reads():
                print(f"\n{name}: {self._promise}; once more ends the ranks at once", flush=True)
            if self.on_first is not None:
                self.on_first()


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        code: 0 finished or stopped as asked, 2 the user's to correct, 1 anything else.
        state: What rank 0 wrote last, or would have, had it begun before it was asked to stop;
            None if the ranks did not come to an end of theirs.
        fault: What died, None at code 0.
    """

    code: int
    state: tuple[State, int] | None
    fault: Fault | None

    def describe(self) -> str:
        """For a person."""
        if self.fault is not None:
            return f"failed: {self.fault.text}"
        assert self.state is not None, "ranks that end well say how far they came"
        state, step = self.state
        if state == "finished":
            return "finished"
        return f"stopped after step {step}" if step > 0 else "stopped before its first step"


def run_attempt(
    cluster: Cluster, run_dir: RunDir, plan: Plan, used: Sequence[Host], signals: StopSignals
) -> Ending:
    """Start the ranks, wait for their end, and see that none is left behind.

    Args:
        cluster: Where they run.
        run_dir: Of the run; all hosts see it.
        plan: For the ranks.
        used: Hosts, each with the ranks it gets.
        signals: Open; what is asked of the launcher.
    """
    # What a run that is asked to stop before its ranks are up comes to: nothing failed.
    unbegun = Ending(0, ("stopped", 0 if plan.resume_step is None else plan.resume_step), None)
    if signals.count > 0:
        return unbegun
    attempt, ranks = secrets.token_hex(4), ranks_of(used)
    run_dir.create()
    run_dir.write_plan(plan)
    run_dir.write_orders(Orders(attempt, stop=False))
    runner = cluster.start(run_dir, attempt, used, cluster.meeting(used))
    watch = Watch(run_dir, attempt, ranks, lambda: cluster.look(run_dir, ranks))

    def ask_stop() -> None:
        run_dir.write_orders(Orders(attempt, stop=True))
        cluster.ask_stop(run_dir, runner)

    signals.on_first = ask_stop
    try:
        if signals.count > 0:  # it came before there was anyone to ask
            ask_stop()
        fault = _wait(runner, watch, signals)
        if fault is not None:
            _end(cluster, run_dir, runner, ranks)
    finally:
        signals.on_first = None
        try:
            # Whoever is left, on a host that does not answer now, ends when it reads this.
            run_dir.write_orders(Orders("none", stop=True))
        finally:
            _kill(runner)
    code = runner.returncode
    if fault is None and code != 0:
        fault = watch.conclude()
    state = run_dir.read_state()
    if signals.count > 0 and not run_dir.read_beats(attempt):
        return unbegun
    if fault is None and state is None:
        fault = Fault("the ranks ended without a word")
    return Ending(0 if fault is None else fault.code, state, fault)


def _wait(runner: subprocess.Popen[bytes], watch: Watch, signals: StopSignals) -> Fault | None:
    """Until the runner ends by itself (None), or something is wrong with its ranks."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            runner.wait(timeout=_POLL_S)
            return None
        if signals.count > 1:
            return Fault("ended at once, as asked")
        with contextlib.suppress(OSError):  # the shared folder may be away for a moment
            fault = watch.check(time.monotonic())
            if fault is not None:
                return fault


def _end(
    cluster: Cluster,
    run_dir: RunDir,
    runner: subprocess.Popen[bytes],
    ranks: dict[str, list[int]],
) -> None:
    run_dir.write_orders(Orders("none", stop=True))
    cluster.end(run_dir, ranks)
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(timeout=_LEAVE_S)


def _kill(runner: subprocess.Popen[bytes]) -> None:
    """End the runner and what it started on this machine.

    pdsh gives each of its ssh processes a session of its own, and one to a host that is cut off
    would outlive it for as long as TCP hopes; so its descendants are ended one by one.

    Never by SIGINT or SIGTERM: DeepSpeed's pdsh runner answers those with a broad `pkill -f` on
    every host.
    """
    if runner.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(runner.pid).children(recursive=True)
            runner.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        runner.wait()
