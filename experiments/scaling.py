"""Whole training steps over the length of the sequence, on one rank or several: what they share.

A step is that of ``haloformer bench step``: the engine of ``haloformer train`` on random tokens,
forward, backward and AdamW, with dropout, each rank a process of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import commit

from haloformer.launcher.bench import device_name

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Rule:
    """Something that must hold, what was found, and whether it does."""

    rule: str
    found: float
    holds: bool


def exponent(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through log(cost) over log(length): 1 is linear cost."""
    slope, _ = np.polyfit(np.log(lengths), np.log(costs), 1)
    return float(slope)


def finish(name: str, folder: Path, record: dict[str, Any], rules: Sequence[Rule]) -> int:
    """Print the rules and write ``NAME.json``.

    Returns:
        Exit code: 0 if every rule holds, else 1.
    """
    print()
    for rule in rules:
        verdict = "holds" if rule.holds else "DOES NOT HOLD"
        print(f"{rule.rule}: {rule.found:.4g} ({verdict})")
    header = {"commit": commit(), "command": " ".join(["python", *sys.argv])}
    record = {**header, "device": device_name(), **record, "must_hold": [asdict(r) for r in rules]}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path} and {path.with_suffix('.png')}")
    return int(not all(rule.holds for rule in rules))


@dataclass(frozen=True)
class Curve:
    """A line of a picture.

    Attributes:
        label: For the legend.
        lengths: Tokens of the sequence.
        values: One per length.
    """

    label: str
    lengths: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Curves of one unit; the slope is that of linear cost on logarithmic axes."""

    unit: str
    curves: Sequence[Curve]
    slope: int = 1


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, both axes logarithmic; a dotted line shows linear cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for curve in panel.curves:
            axes.loglog(curve.lengths, curve.values, "o-", label=curve.label)
        lengths, values = panel.curves[0].lengths, panel.curves[0].values
        ideal = [values[-1] * (n / lengths[-1]) ** panel.slope for n in lengths]
        axes.loglog(lengths, ideal, "k:", label="linear in N")
        ticks = sorted({n for curve in panel.curves for n in curve.lengths})
        axes.set_xticks(ticks, [_short(n) for n in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("tokens of the sequence")
        axes.set_ylabel(panel.unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _short(n: int) -> str:
    power = int(math.log2(n)) // 10
    return f"{n >> (10 * power)}{('', 'K', 'M')[power]}" if n % 1024 == 0 else str(n)
