"""Run a test function on real processes that talk over gloo.

    def sums(rank, world_size, x):            # module level, in the test file or any module
        total = torch.tensor(float(x + rank))
        torch.distributed.all_reduce(total)
        return total.item()

    assert run_ranks(2, sums, 10) == [21.0, 21.0]

The ranks are forked from one server process that has imported the heavy libraries: importing
torch, DeepSpeed and megatron takes 6 s of a core, which no rank should have to spend again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# Imported by the fork server at its start; what is not installed is passed over.
_PRELOAD = ["torch.distributed.checkpoint", "haloformer.launcher.runtime"]
_PRELOAD += ["haloformer.launcher.topology"]
_PRELOAD += ["deepspeed.runtime.zero.muon.original_muon"]  # every engine looks whether it is one

# After one rank has failed, the others have this long to notice by themselves.
_GRACE_S = 10.0


class RanksFailedError(AssertionError):
    """Some ranks failed; the message holds what every one of them said."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 300.0, threads: int = 1
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on ``world_size`` new processes, one gloo world.

    The ranks meet through a file, so no port is taken. When a rank raises, dies or passes the
    time limit, the rest are ended, by pid, and every rank's traceback is in the error.

    Args:
        world_size: Number of processes.
        fn: A function at the top level of its module.
        args: Arguments that pickle can carry: plain values, tensors, classes of importable
            modules such as ``cases`` (a class of a test file is not importable).
        timeout: Seconds for the whole call, the start of the processes included.
        threads: Threads that torch may use in each process.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RanksFailedError: With the tracebacks of all ranks that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    source = inspect.getsourcefile(fn)
    assert source is not None
    payload = pickle.dumps(args)
    processes: list[ForkServerProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                target = (fn.__module__, str(Path(source).resolve()), fn.__qualname__, payload)
                process = context.Process(
                    target=_child,
                    args=(theirs, rank, world_size, threads, folder, timeout, target),
                    daemon=True,
                )
                process.start()
                theirs.close()  # so that the death of the child closes the pipe
                processes.append(process)
                pipes.append(ours)
            answers = _collect(pipes, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        faults = _faults(answers, processes, Path(folder))
    if faults:
        raise RanksFailedError("\n".join(faults))
    return [pickle.loads(answer[1]) for answer in answers if answer is not None]


def _collect(pipes: list[Connection], timeout: float) -> list[tuple[str, bytes] | None]:
    """Wait for every rank's answer; None for a rank that gave none in time."""
    answers: list[tuple[str, bytes] | None] = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    # The child's own alarm goes off at `timeout` and prints where it hangs: leave it room.
    deadline = time.monotonic() + timeout + 5.0
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            with contextlib.suppress(EOFError):  # died without a word: reported by its exit code
                answers[rank] = pipe.recv()
            answer = answers[rank]
            if answer is None or answer[0] != "ok":
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return answers


def _faults(
    answers: list[tuple[str, bytes] | None], processes: list[ForkServerProcess], folder: Path
) -> list[str]:
    faults = []
    for rank, (answer, process) in enumerate(zip(answers, processes, strict=True)):
        if answer is None:
            hang = folder / f"hang{rank}"
            where = hang.read_text() if hang.exists() else ""
            faults.append(f"--- rank {rank} gave no answer, exit code {process.exitcode}\n{where}")
        elif answer[0] != "ok":
            faults.append(f"--- rank {rank} raised\n{answer[1].decode()}")
    return faults


def _child(
    pipe: Connection,
    rank: int,
    world_size: int,
    threads: int,
    folder: str,
    timeout: float,
    target: tuple[str, str, str, bytes],
) -> None:
    # What was imported before the fork never goes. DeepSpeed has the collector look through all
    # there is whenever it starts ZeRO-3: a third of what the ranks would do.
    gc.freeze()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(os.path.join(folder, f"hang{rank}"), "w") as hang:
        faulthandler.dump_traceback_later(timeout, exit=True, file=hang)
        try:
            import torch
            import torch.distributed

            torch.set_num_threads(threads)
            fn = _load(*target[:3])
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            result = fn(rank, world_size, *pickle.loads(target[3]))
            pipe.send(("ok", pickle.dumps(result)))
            # A rank that left would cut its connections, which a slow one may still be making.
            # The caller ends all of them when all have answered; the alarm does if it is gone.
            while True:
                signal.pause()
        except BaseException:
            pipe.send(("error", traceback.format_exc().encode()))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _load(module_name: str, source: str, qualname: str) -> Callable[..., Any]:
    """Import the function by module name or, for a test file, by its path."""
    try:
        found = importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:
        found = False
    if found:
        module = importlib.import_module(module_name)
    else:
        spec = importlib.util.spec_from_file_location(module_name, source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    fn: Callable[..., Any] = getattr(module, qualname)
    return fn
