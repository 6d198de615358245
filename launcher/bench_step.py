"""Whole training steps beside transformers': time and memory, each side in its own processes.

Ours is what ``haloformer train`` runs: on the CPU one rank of two threads, and two context-parallel
ranks of one thread each; theirs is one process of two threads, on the same two cores. On GPUs a
rank has one each. Contenders take turns, one step at a time. Time and memory are taken in
different processes: memory is honest where freed blocks go back to the system at once, and that
costs time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from haloformer.launcher.bench_step_cases import StepCase, is_promised
from haloformer.launcher.bench_step_contender import (
    Contender,
    Device,
    Setup,
    no_room_for,
)

Say = Callable[[str], None]
_CORES = 2
_GIB = 1024.0  # in MiB
_PAGE_MIB = 4 / 1024  # a step of a tiny model may need no more than the process has already
# What our step must reach beside transformers', and where memory is bounded outright.
_SPEED, _MEMORY, _LED_LIMIT_MIB = 4.0, 0.25, 4 * _GIB
_SLOWER = 1.1  # two ranks over one rank on the same cores
WEIGHTS = ("step_growth_mib", "whole_growth_mib", "peak_rss_mib")
THEIRS: Literal["transformers"] = "transformers"


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What to measure.

    Attributes:
        cases: One after the other; of one kind, the shorter first.
        ranks: Numbers of context-parallel ranks of ours that take turns.
        steps: Timed steps of each contender, after one that is not.
        weigh_apart: Memory in processes of their own; False takes it from the timed ones, where
            blocks that are free but kept blur it.
        seconds: Most that one step may take.
        device: Where both sides compute.
    """

    cases: tuple[StepCase, ...]
    ranks: tuple[int, ...] = (1, 2)
    steps: int = 3
    weigh_apart: bool = True
    seconds: float = 900.0
    device: Device = "cpu"

    def contenders(self, thrifty: bool) -> dict[str, Setup]:
        """Who takes turns, by name."""
        both = Setup(THEIRS, 1, _CORES, self.device, thrifty, self.seconds)
        setups = {
            ours(n): dataclasses.replace(both, role="ours", ranks=n, threads=max(1, _CORES // n))
            for n in self.ranks
        }
        return {**setups, THEIRS: both}


def ours(ranks: int) -> str:
    """Name of our side on so many ranks."""
    return f"{ranks} rank{'s' * (ranks > 1)}"


def measure(settings: StepSettings, say: Say) -> dict[str, Any]:
    """Check parity, then weigh and time every case.

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
    with Contender(Setup("parity", seconds=settings.seconds)) as checked:
        errors = checked.built[0]["errors"]
    results: list[dict[str, Any]] = []
    for case in settings.cases:
        results.append(_case(case, settings, results, say))
    return {
        "parity": "ok",
        "parity_errors": errors,
        "device": device_name() if settings.device == "cpu" else _gpu_name(),
        "versions": versions(),
        "load_average_after": os.getloadavg(),
        "settings": {"ranks": settings.ranks, "steps": settings.steps, "device": settings.device},
        "layout": f"ours: 1 rank x {_CORES} threads, or context-parallel ranks that share them, "
        f"DeepSpeed ZeRO-1, AdamW; transformers: 1 process x {_CORES} threads",
        "cases": results,
    }


def _gpu_name() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them"


def _case(
    case: StepCase, settings: StepSettings, before: Sequence[dict[str, Any]], say: Say
) -> dict[str, Any]:
    title = f"{case.kind}, {case.tokens} tokens"
    result: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "load_average": os.getloadavg(),  # of the machine, before our own
        "contenders": {name: {"note": ""} for name in settings.contenders(False)},
    }
    rows = result["contenders"]
    weighed: dict[str, list[dict[str, Any]]] = {}
    for name, setup in settings.contenders(thrifty=True).items():
        fault = no_room_for(_expected_mib(case, name, before)) if setup.device == "cpu" else None
        if fault is not None:
            rows[name]["note"] = fault
            say(f"{title}, {name}: left out, {fault}")
        elif settings.weigh_apart:
            say(f"{title}, {name}: memory")
            with Contender(setup, case) as contender:
                contender.step()
                # Only the second step has the optimizer's state beside its activations.
                weighed[name] = contender.step()
    timed = {
        name: setup
        for name, setup in settings.contenders(thrifty=False).items()
        if not rows[name]["note"]
    }
    turns, latest = _take_turns(case, timed, settings.steps, lambda line: say(f"{title}, {line}"))
    for name in timed:
        # The slowest rank ends a step; ranks wait for each other, so they differ by little.
        seconds = statistics.median(turns[name])
        rows[name] |= {
            "seconds_per_step": seconds,
            "seconds_of_steps": turns[name],
            "tokens_per_second": case.tokens_per_step / seconds,
            "loss": latest[name][0]["loss"],
            **{key: [p[key] for p in weighed.get(name, latest[name])] for key in WEIGHTS},
        }
    result["ratios"] = _ratios(rows, settings.ranks)
    result["must_hold"] = _must_hold(case, result["ratios"], rows, settings.device)
    return result


def _expected_mib(case: StepCase, name: str, before: Sequence[dict[str, Any]]) -> float:
    """By the last shorter case of the kind: memory grows with the length. 0 where none is known."""
    expected = 0.0
    for entry in before:
        row = entry["contenders"][name]
        if entry["case"]["kind"] != case.kind:
            continue
        if row["note"]:
            return float("inf")
        expected = sum(row["whole_growth_mib"]) * case.tokens / entry["case"]["tokens"]
    return expected


def _take_turns(
    case: StepCase, setups: dict[str, Setup], steps: int, say: Say
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:
    """Seconds of each timed step by contender, and what its ranks found in the last."""
    turns: dict[str, list[float]] = {name: [] for name in setups}
    latest: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        contenders = {}
        for name, setup in setups.items():
            contenders[name] = stack.enter_context(Contender(setup, case))
        for number in range(steps + 1):
            for name, contender in contenders.items():
                latest[name] = contender.step()
                seconds = max(rank["seconds"] for rank in latest[name])
                if number > 0:  # the first is not counted
                    turns[name].append(seconds)
                say(f"time, round {number}, {name}: {seconds:.2f} s")
    return turns, latest


def _ratios(rows: dict[str, dict[str, Any]], ranks: Sequence[int]) -> dict[str, float]:
    """Medians over the rounds of neighbouring turns; memory as one number of each side."""
    found = {}
    theirs = rows[THEIRS]
    for name in (ours(n) for n in ranks):
        row = rows[name]
        if row["note"] or theirs["note"]:
            continue
        found[f"tokens_per_second, {name}"] = _median_ratio(theirs, row)
        for key in WEIGHTS:
            weight = max(theirs[key][0], _PAGE_MIB)
            found[f"{key}_per_rank, {name}"] = max(*row[key], _PAGE_MIB) / weight
            found[f"{key}_of_all_ranks, {name}"] = max(sum(row[key]), _PAGE_MIB) / weight
    if {1, 2} <= set(ranks) and not (rows[ours(1)]["note"] or rows[ours(2)]["note"]):
        found["seconds, 2 ranks over 1"] = _median_ratio(rows[ours(2)], rows[ours(1)])
    return found


def _median_ratio(above: dict[str, Any], below: dict[str, Any]) -> float:
    pairs = zip(above["seconds_of_steps"], below["seconds_of_steps"], strict=True)
    return float(statistics.median(a / b for a, b in pairs))


def _must_hold(
    case: StepCase, ratios: dict[str, float], rows: dict[str, dict[str, Any]], device: Device
) -> list[dict[str, Any]]:
    """The promises of a CPU with two cores, at the sizes that they are made for."""
    two = ours(2)
    if device != "cpu" or not is_promised(case) or f"tokens_per_second, {two}" not in ratios:
        return []
    speed, share = (
        ratios[f"{key}, {two}"] for key in ("tokens_per_second", f"{WEIGHTS[0]}_per_rank")
    )
    rules = [
        (f"tokens/s over transformers' >= {_SPEED:g}", speed, speed >= _SPEED),
        (f"growth over transformers' <= {_MEMORY:g}", share, share <= _MEMORY),
    ]
    if case.kind == "led":
        peak = max(rows[two]["peak_rss_mib"])
        rules.append((f"peak MiB per rank <= {_LED_LIMIT_MIB:g}", peak, peak <= _LED_LIMIT_MIB))
    slower = ratios.get("seconds, 2 ranks over 1")
    if slower is not None:
        rules.append((f"time of 2 ranks over 1 rank's <= {_SLOWER:g}", slower, slower <= _SLOWER))
    return [{"rule": rule, "found": found, "holds": holds} for rule, found, holds in rules]
