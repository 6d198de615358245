"""Measure the attention op against its peers and against the arithmetic it cannot avoid.

Parity comes first, and nothing is timed if it fails. Contenders take turns, so that noise of the
machine falls on all of them; numbers are medians, and ratios are taken within one run. The floor
is the FLOPs of the band over the rate of one large matrix product, timed in the same turns.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from haloformer.kernels.dispatch import WindowAttention
from haloformer.launcher.bench_memory import peak_growth_mib
from haloformer.launcher.bench_parity import ParityError, check_parity
from haloformer.launcher.bench_peers import (
    MAKERS,
    OURS,
    Contender,
    Part,
    Shape,
    UnavailableError,
    named_backend,
    ours,
    run_once,
)

_GEMM_SIZE = 2048
_PARTS: tuple[Part, ...] = ("fwd", "fwd_bwd")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        lengths: Sequence lengths N.
        window: Two-sided window.
        num_heads: Heads.
        head_dim: Features of a head.
        peers: Names of ``MAKERS`` beside our op.
        rounds: Turns of each contender.
        seconds: A contender that has taken this long at one N gets no further turn.
        threads: Of torch.
        backend: Who computes our op.
    """

    lengths: tuple[int, ...] = (4096, 16384)
    window: int = 512
    num_heads: int = 12
    head_dim: int = 64
    peers: tuple[str, ...] = tuple(name for name in MAKERS if name != OURS)
    rounds: int = 5
    seconds: float = 30.0
    threads: int = 2
    backend: str = "chunks"

    def shape(self, n: int) -> Shape:
        """The plain shape at one length."""
        return Shape(n, self.window, self.num_heads, self.head_dim)


Say = Callable[[str], None]


def measure(settings: Settings, say: Say, attend: WindowAttention | None = None) -> dict[str, Any]:
    """Check parity, then time and weigh everything.

    Args:
        settings: What to measure.
        say: Told what is being done, a line at a time.
        attend: Our op; None takes the backend of the settings.

    Returns:
        The report, ready for JSON.

    Raises:
        ParityError: If our op, or a peer that should give the same, computes something else.
        ValueError: If the backend cannot run here.
    """
    torch.set_num_threads(settings.threads)
    largest = settings.shape(max(settings.lengths))
    op = named_backend(settings.backend, largest) if attend is None else attend
    say("parity")
    checks = check_parity(op, largest)
    results, floors = [], []
    for n in settings.lengths:
        say(f"time, N={n}")
        rows, floor = _time_contenders(settings, n, op)
        for row in rows:
            say(f"memory, N={n}, {row['contender']}")
            row |= _weigh(settings, settings.shape(n), row)
        results += rows
        floors.append(floor)
    say(f"ratios that must hold, N={largest.n}")
    return {
        "parity": "ok",
        "parity_checks": [dataclasses.asdict(check) for check in checks],
        "device": device_name(),
        "versions": versions(),
        "settings": dataclasses.asdict(settings),
        "floor": floors,
        "results": results,
        "must_hold": must_hold(largest, op, settings.rounds),
    }


def _time_contenders(
    settings: Settings, n: int, op: WindowAttention
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    shape = settings.shape(n)
    running, notes = _start_contenders(settings, shape, op)
    spent: dict[tuple[str, Part], list[float]] = {}
    rates = []
    for _ in range(settings.rounds):
        rates.append(gemm_rate())
        for name, contender in running.items():
            for part in _PARTS:
                times = spent.setdefault((name, part), [])
                without = part == "fwd_bwd" and contender.backward is not None
                if not without and sum(times) < settings.seconds:
                    times.append(_seconds(contender, part))
    rate = statistics.median(rates)
    floor = {part: shape.flops(backward=part == "fwd_bwd") / rate for part in _PARTS}
    rows = []
    for name in (OURS, *settings.peers):
        row: dict[str, Any] = {"contender": name, "n": n, "note": notes.get(name, "")}
        for part in _PARTS:
            times, mine = spent.get((name, part), []), statistics.median(spent[OURS, part])
            median = statistics.median(times) if times else None
            row[f"{part}_ms"] = None if median is None else median * 1e3
            row[f"{part}_over_ours"] = None if median is None else median / mine
            row[f"{part}_over_floor"] = None if median is None else median / floor[part]
            row[f"{part}_rounds"] = len(times)
        rows.append(row)
    floors = {f"{part}_ms": floor[part] * 1e3 for part in _PARTS}
    return rows, {"n": n, "gemm_gflops": rate / 1e9, **floors}


def _start_contenders(
    settings: Settings, shape: Shape, op: WindowAttention
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that ran once and gave what ours gives, and a note on each that is not whole."""
    notes: dict[str, str] = {}
    running: dict[str, Contender] = {}
    expected = None
    for name in (OURS, *settings.peers):
        try:
            contender = MAKERS[name](shape, op)
            out = run_once(contender, "fwd")
        except Exception as error:  # a peer that fails is a line in the table, with its words
            if name == OURS:
                raise
            first = str(error).strip().splitlines() or [type(error).__name__]
            notes[name] = first[0][:200]
            continue
        expected = out if expected is None else expected
        if contender.comparable and not torch.allclose(out, expected, rtol=1e-3, atol=1e-4):
            raise ParityError(f"{name} and {OURS} differ at N={shape.n}: one of them is wrong")
        running[name] = contender
        if contender.backward is not None:
            notes[name] = contender.backward
    return running, notes


def _weigh(settings: Settings, shape: Shape, row: dict[str, Any]) -> dict[str, Any]:
    part: Part = "fwd" if row["fwd_bwd_ms"] is None else "fwd_bwd"
    if row["fwd_ms"] is None:
        return {"peak_growth_mib": None, "peak_growth_of": None}
    try:
        peak = peak_growth_mib(row["contender"], shape, part, settings.backend, settings.threads)
    except UnavailableError as error:
        note = "; ".join(x for x in (row["note"], str(error)) if x)
        return {"peak_growth_mib": None, "peak_growth_of": None, "note": note}
    return {"peak_growth_mib": peak, "peak_growth_of": part}


def must_hold(shape: Shape, attend: WindowAttention, rounds: int) -> list[dict[str, Any]]:
    """The three promises about cost, as medians of ratios of neighbouring turns.

    Args:
        shape: The plain shape; its variants differ in one thing each.
        attend: Our op.
        rounds: Turns of each.
    """
    plain = ours(shape, attend)
    variants = {
        "halved window": replace(shape, window=shape.window // 2),
        "dilation 2": replace(shape, dilation=2),
        "dilation 4": replace(shape, dilation=4),
        "64 global keys": replace(shape, num_globals=64),
    }
    found = []
    for name, variant in variants.items():
        other = ours(variant, attend)
        entry: dict[str, Any] = {"name": name, "n": shape.n}
        run_once(other, "fwd_bwd")
        for part in _PARTS:
            pairs = [(_seconds(plain, part), _seconds(other, part)) for _ in range(rounds)]
            entry[part] = _promise(name, pairs)
        rule, holds = _RULES[name]
        entry["rule"] = rule
        entry["holds"] = all(holds(entry[part]) for part in _PARTS)
        found.append(entry)
    return found


_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "halved window": ("time over that of half the window >= 1.6", lambda x: x >= 1.6),
    "dilation 2": ("time over that of dilation 1 <= 1.3", lambda x: x <= 1.3),
    "dilation 4": ("time over that of dilation 1 <= 1.3", lambda x: x <= 1.3),
    "64 global keys": ("share of the op's time <= 0.15", lambda x: x <= 0.15),
}


def _promise(name: str, pairs: list[tuple[float, float]]) -> float:
    if name == "halved window":
        return statistics.median(plain / other for plain, other in pairs)
    if name == "64 global keys":
        return statistics.median(1.0 - plain / other for plain, other in pairs)
    return statistics.median(other / plain for plain, other in pairs)


def gemm_rate() -> float:
    """FLOP/s of one large float32 matrix product, best of three: the arithmetic's own speed."""
    a = torch.ones(_GEMM_SIZE, _GEMM_SIZE)
    out = torch.empty_like(a)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        times.append(time.perf_counter() - start)
    return 2.0 * _GEMM_SIZE**3 / min(times)


def _seconds(contender: Contender, part: Part) -> float:
    start = time.perf_counter()
    run_once(contender, part)
    return time.perf_counter() - start


def device_name() -> str:
    """The CPU and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def versions() -> dict[str, str | None]:
    """Of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
