"""The processes of one side of ``haloformer bench step``: they build once, then step when told.

So contenders can take turns, and noise of the machine falls on all of them::

    this process     step ------------> step ----------->       one line on stdin each
    contender A           <-- seconds                           one line of JSON from each rank
    contender B                              <-- seconds
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Literal

from haloformer.launcher.bench_step_cases import StepCase

Role = Literal["ours", "transformers", "parity"]
Device = Literal["cpu", "cuda"]
_RETURN_ABOVE = str(1 << 18)
_POLL_S, _END_S = 0.2, 60.0
_USABLE = 0.85  # of the memory that is free: others on the machine need some too


class StepBenchError(Exception):
    """A contender failed, or computes something else; there is no report."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Who runs, and on what.

    Attributes:
        role: Which side.
        ranks: Processes; of ``ours`` only, which shares the sequence among them.
        threads: Of each process.
        device: ``cuda`` gives each process a GPU of its own.
        thrifty: Freed blocks go back to the system at once: memory is then what is in use, and
            steps take longer.
        seconds: Most that one answer may take.
    """

    role: Role
    ranks: int = 1
    threads: int = 1
    device: Device = "cpu"
    thrifty: bool = False
    seconds: float = 900.0


class Contender:
    """One side's processes; use as a context manager, they are gone afterwards.

    Args:
        setup: Who runs, and on what.
        case: What they train; the parity check has cases of its own.
    """

    def __init__(self, setup: Setup, case: StepCase | None = None) -> None:
        self._setup = setup
        self._words = [setup.role, "--threads", str(setup.threads), "--device", setup.device]
        if case is not None:
            self._words += ["--case", json.dumps(dataclasses.asdict(case))]
        self._stack = ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors: list[Any] = []
        self.built: list[dict[str, Any]] = []

    def __enter__(self) -> Contender:
        try:
            environment = self._environment()
            for rank in range(self._setup.ranks):
                self._start(rank, environment)
            self.built = self._answers()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def step(self) -> list[dict[str, Any]]:
        """Train one step: what each rank found, in rank order.

        Raises:
            StepBenchError: If a process fails or takes too long.
        """
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(b"step\n")
                process.stdin.flush()
            except BrokenPipeError:  # it has died since; its end of the other pipe tells how
                break
        return self._answers()

    def _environment(self) -> dict[str, str]:
        # The port is chosen late, so that it is still free when rank 0 takes it.
        from haloformer.launcher.launch import choose_port

        setup = self._setup
        wanted = {
            "OMP_NUM_THREADS": str(setup.threads),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(choose_port(None)),
            "WORLD_SIZE": str(setup.ranks),
            "DS_ACCELERATOR": setup.device,
        }
        if setup.device == "cpu":
            wanted["CUDA_VISIBLE_DEVICES"] = ""  # the same contender whatever the machine has
        if setup.thrifty:
            wanted["MALLOC_MMAP_THRESHOLD_"] = _RETURN_ABOVE
        return {**os.environ, **wanted}

    def _start(self, rank: int, environment: dict[str, str]) -> None:
        said = self._stack.enter_context(TemporaryFile())  # noqa: SIM115
        command = [sys.executable, "-m", "haloformer.launcher.bench_step_worker", *self._words]
        process = subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        self._processes.append(process)
        self._errors.append(said)

    def _answers(self) -> list[dict[str, Any]]:
        """One line from each process; the first that fails ends the wait."""
        deadline = time.monotonic() + self._setup.seconds
        found: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as pipes:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                pipes.register(process.stdout, selectors.EVENT_READ, (rank, process.stdout))
            while len(found) < len(self._processes):
                for key, _ in pipes.select(_POLL_S):
                    rank, pipe = key.data
                    # Never more than one line is under way, so none is left in the buffer.
                    line = pipe.readline()
                    if not line:
                        self._tell_failure(rank)
                    found[rank] = json.loads(line)
                    pipes.unregister(pipe)
                if time.monotonic() > deadline:
                    role, seconds = self._setup.role, self._setup.seconds
                    raise StepBenchError(f"{role}: not done after {seconds:.0f} s")
        return [found[rank] for rank in range(len(found))]

    def _tell_failure(self, rank: int) -> None:
        code = self._processes[rank].wait(_END_S)
        self._errors[rank].seek(0)
        said = self._errors[rank].read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "without a word"
        if code == -9:
            last += " (killed: out of memory?)"
        raise StepBenchError(f"{self._setup.role}: exit code {code}: {last}")

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()  # closes its pipes
        self._stack.close()


def no_room_for(mib: float) -> str | None:
    """Why so much more memory had better not be used, in a few words; None if there is room."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) / 1024
            if mib > _USABLE * free:
                return f"needs about {mib:.0f} MiB, {free:.0f} MiB are free"
    return None
