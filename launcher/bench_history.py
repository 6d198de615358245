"""What ``haloformer bench step`` found before, one line a run, and the gate against getting worse.

A line holds ratios only: seconds of a busy machine say little, ratios within one run say much.
Every ratio is how many times better we are, so larger is better::

    {"date": ..., "commit": ..., "device": ..., "settings": {...}, "command": ...,
     "ratios": {"mlm 4096: tokens/s, 2 ranks": 4.1, ...}, "must_hold": {"mlm 4096: ...": true}}

A ratio below ``TOLERATED`` of the median of the last ``RECENT`` lines of the same device and the
same settings is a regression. Such a run adds no line, so that it cannot become what later runs
are held to: where the loss is meant, remove the older lines, for all to see in the commit.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haloformer.launcher.bench_step import THEIRS, WEIGHTS

# Medians of three turns on two noisy cores differ by a tenth from run to run.
TOLERATED, RECENT = 0.85, 5

Line = dict[str, Any]


def line_of(report: dict[str, Any]) -> Line:
    """The line of a report of ``bench_step.measure`` that knows its command.

    Args:
        report: With ``command``.
    """
    ratios: dict[str, float] = {}
    must_hold: dict[str, bool] = {}
    for entry in report["cases"]:
        case, found = entry["case"], entry["ratios"]
        title = f"{case['kind']} {case['tokens']}"
        for name in entry["contenders"]:
            if f"tokens_per_second, {name}" in found and name != THEIRS:
                ratios[f"{title}: tokens/s, {name}"] = found[f"tokens_per_second, {name}"]
                ratios[f"{title}: memory, {name}"] = 1 / found[f"{WEIGHTS[0]}_per_rank, {name}"]
        slower = found.get("seconds, 2 ranks over 1")
        if slower is not None:
            ratios[f"{title}: 2 ranks over 1"] = 1 / slower
        must_hold |= {f"{title}: {rule['rule']}": rule["holds"] for rule in entry["must_hold"]}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": report["device"],
        "settings": report["settings"] | {"cases": [_size(x["case"]) for x in report["cases"]]},
        "command": report["command"],
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "must_hold": must_hold,
    }


def _size(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def _commit() -> str | None:
    """The commit of the working folder, None outside a repository."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read(path: Path) -> list[Line]:
    """The lines of a history, the oldest first; none if there is no file.

    Raises:
        ValueError: If a line is not one of ours.
    """
    lines: list[Line] = []
    text = path.read_text() if path.exists() else ""
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
            assert isinstance(line["ratios"], dict) and "device" in line and "settings" in line
        except (ValueError, TypeError, KeyError, AssertionError):
            raise ValueError(
                f"{path} line {number} is no line of a history; remove it or give another file"
            ) from None
        lines.append(line)
    return lines


def regressions(line: Line, before: Sequence[Line]) -> list[str]:
    """A sentence on each ratio that is worse than it was.

    Args:
        line: The new one.
        before: The history, the oldest first; lines of other devices or settings do not count.
    """
    # As JSON, in which a tuple of the new line is the list of the older ones.
    key = _identity(line)
    recent = [old["ratios"] for old in before if _identity(old) == key][-RECENT:]
    found = []
    for name, ratio in line["ratios"].items():
        values = [ratios[name] for ratios in recent if name in ratios]
        if values and ratio < TOLERATED * (usual := statistics.median(values)):
            found.append(
                f"{name}: {ratio:.2f}, below {TOLERATED:g} x {usual:.2f}, the median of the last "
                f"{len(values)} on this device"
            )
    return found


def _identity(line: Line) -> str:
    return json.dumps([line["device"], line["settings"]], sort_keys=True)


def append(line: Line, path: Path) -> None:
    """Add a line to a history."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
