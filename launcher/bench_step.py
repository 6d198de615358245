"""Whole training steps beside transformers': time and memory, each side in its own processes.

Ours is what ``haloformer train`` runs on two context-parallel ranks of one thread each; theirs is
one process with two threads, on the same two cores. Time and memory are taken in different
processes: memory is honest where freed blocks go back to the system at once, and that costs time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from haloformer.launcher.bench_step_cases import StepCase

RANKS = 2
_RETURN_ABOVE = str(1 << 18)
_POLL_S = 0.1
_GIB = 1024.0  # in MiB
# What our step must reach beside transformers', and where memory is bounded outright.
_SPEED, _MEMORY, _LED_LIMIT_MIB = 4.0, 0.25, 4 * _GIB


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What to measure.

    Attributes:
        cases: One after the other.
        steps: Timed steps of each contender, after one that is not.
        weigh_apart: Memory in processes of their own; False takes it from the timed ones, where
            blocks that are free but kept blur it.
        seconds: Most that one contender may take for all its steps.
    """

    cases: tuple[StepCase, ...]
    steps: int = 2
    weigh_apart: bool = True
    seconds: float = 900.0


class StepBenchError(Exception):
    """A contender failed, or computes something else; there is no report."""


def measure(settings: StepSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Check parity, then time and weigh every case.

    Args:
        settings: What to measure.
        say: Told what is being done, a line at a time.

    Returns:
        The report, ready for JSON.

    Raises:
        StepBenchError: If parity fails, or a contender does.
        ValueError: If it cannot be measured here.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("memory is measured on Linux only; run it there")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is missing; pip install 'haloformer[hf]'")
    # It brings torch along.
    from haloformer.launcher.bench import device_name, versions

    say("parity")
    (found,) = _run([["parity"]], settings.seconds, {})
    results = [_case(case, settings, say) for case in settings.cases]
    return {
        "parity": "ok",
        "parity_errors": found["errors"],
        "device": device_name(),
        "versions": versions(),
        "load_average_after": os.getloadavg(),
        "layout": f"{RANKS} context-parallel ranks x 1 thread, DeepSpeed ZeRO-1, AdamW; "
        f"transformers: 1 process x {RANKS} threads",
        "cases": results,
    }


def _case(case: StepCase, settings: StepSettings, say: Callable[[str], None]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "load_average": os.getloadavg(),  # of the machine, before our own
    }
    for role in ("ours", "transformers"):
        say(f"{case.kind}, {case.tokens} tokens, {role}: time")
        timed = _contender(role, case, settings.steps + 1, settings.seconds, {})
        weighed = timed
        if settings.weigh_apart:
            say(f"{case.kind}, {case.tokens} tokens, {role}: memory")
            thrifty = {"MALLOC_MMAP_THRESHOLD_": _RETURN_ABOVE}
            # Two steps: only the second has the optimizer's state beside its activations.
            weighed = _contender(role, case, 2, settings.seconds, thrifty)
        # The slowest rank ends a step; ranks wait for each other, so they differ by little.
        per_step = [max(times) for times in zip(*(p["seconds"] for p in timed), strict=True)]
        seconds = statistics.median(per_step[1:])
        result[role] = {
            "seconds_per_step": seconds,
            "seconds_of_steps": per_step,
            "tokens_per_second": case.tokens_per_step / seconds,
            "losses": timed[0]["losses"],
            **{key: [p[key] for p in weighed] for key in _WEIGHTS},
        }
    result["ratios"] = _ratios(result["ours"], result["transformers"])
    result["must_hold"] = _must_hold(case, result)
    return result


_WEIGHTS = ("step_growth_mib", "whole_growth_mib", "peak_rss_mib")


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    found = {"tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"]}
    for key in _WEIGHTS:
        found[f"{key}_per_rank"] = max(ours[key]) / theirs[key][0]
        found[f"{key}_of_all_ranks"] = sum(ours[key]) / theirs[key][0]
    return found


def _must_hold(case: StepCase, result: dict[str, Any]) -> list[dict[str, Any]]:
    speed = result["ratios"]["tokens_per_second"]
    rules = [(f"tokens/s over transformers' >= {_SPEED:g}", speed, speed >= _SPEED)]
    if case.kind == "mlm":
        share = result["ratios"]["step_growth_mib_per_rank"]
        rules.append((f"growth over transformers' <= {_MEMORY:g}", share, share <= _MEMORY))
    else:
        peak = max(result["ours"]["peak_rss_mib"])
        rules.append((f"peak MiB per rank <= {_LED_LIMIT_MIB:g}", peak, peak <= _LED_LIMIT_MIB))
    return [{"rule": rule, "found": found, "holds": holds} for rule, found, holds in rules]


def _contender(
    role: str, case: StepCase, steps: int, seconds: float, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """What each process of one contender found, in rank order."""
    # The port is chosen late, so that it is still free when rank 0 takes it.
    from haloformer.launcher.launch import choose_port

    ranks = RANKS if role == "ours" else 1
    threads = RANKS // ranks
    words = [role, "--case", json.dumps(dataclasses.asdict(case)), "--steps", str(steps)]
    shared = {
        **environment,
        "OMP_NUM_THREADS": str(threads),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(choose_port(None)),
        "WORLD_SIZE": str(ranks),
    }
    return _run([[*words, "--threads", str(threads)]] * ranks, seconds, shared)


def _run(
    commands: Sequence[list[str]], seconds: float, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Run workers side by side, to the end or until one fails; all are gone afterwards."""
    role, processes = commands[0][0], []
    with ExitStack() as stack:
        files = [
            [stack.enter_context(TemporaryFile("w+")) for _ in ("stdout", "stderr")]
            for _ in commands
        ]
        try:
            for rank, (words, (out, err)) in enumerate(zip(commands, files, strict=True)):
                command = [sys.executable, "-m", "haloformer.launcher.bench_step_worker", *words]
                env = {**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": "0"}
                processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=err))
            codes = _wait(role, processes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [[_read(file) for file in pair] for pair in files]
    for code, (_, said) in zip(codes, texts, strict=True):
        if code:
            last = (said.strip().splitlines() or ["without a word"])[-1]
            raise StepBenchError(f"{role}: exit code {code}: {last}")
    return [json.loads(out.splitlines()[-1]) for out, _ in texts]


def _wait(role: str, processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Exit codes when all are done or one has failed; None for those that still run then."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(codes):
            return codes
        if time.monotonic() > deadline:
            raise StepBenchError(f"{role}: not done after {seconds:.0f} s")
        time.sleep(_POLL_S)


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def table(report: dict[str, Any]) -> list[str]:
    """Lines of the report for a terminal."""
    versions = report["versions"]
    lines = [
        f"{report['device']}, torch {versions['torch']}, transformers {versions['transformers']}",
        report["layout"],
        f"parity: {report['parity']}, errors {report['parity_errors']}",
    ]
    for entry in report["cases"]:
        case = entry["case"]
        lines += [
            "",
            f"{case['kind']}: {case['tokens']} + {case['targets']} tokens, {case['layers']} layers "
            f"x {case['hidden']}, window {case['window']}, vocabulary {case['vocab']}, recompute "
            f"{case['recompute']}; load {entry['load_average'][0]:.1f} before",
            f"{'':14}{'s/step':>9}{'tokens/s':>10}"
            f"{'step MiB':>10}{'whole MiB':>11}{'peak MiB':>10}",
        ]
        for role in ("ours", "transformers"):
            row = entry[role]
            weights = [max(row[key]) for key in _WEIGHTS]
            lines.append(
                f"{role:14}{row['seconds_per_step']:9.2f}{row['tokens_per_second']:10.0f}"
                f"{weights[0]:10.0f}{weights[1]:11.0f}{weights[2]:10.0f}"
            )
        for rule in entry["must_hold"]:
            verdict = "holds" if rule["holds"] else "DOES NOT HOLD"
            lines.append(f"{rule['rule']}: {rule['found']:.2f} ({verdict})")
    lines += ["", "MiB of ours are of the larger rank; step: beyond the built model and engine"]
    return lines
