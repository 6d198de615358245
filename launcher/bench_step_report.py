"""The report of ``haloformer bench step`` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from haloformer.launcher.bench_step import THEIRS, WEIGHTS


def table(report: dict[str, Any]) -> Iterator[str]:
    """Lines of the report for a terminal.

    Args:
        report: Of ``bench_step.measure``.
    """
    versions = report["versions"]
    yield f"{report['device']}, torch {versions['torch']}, transformers {versions['transformers']}"
    yield report["layout"]
    yield f"parity: {report['parity']}, errors {report['parity_errors']}"
    for entry in report["cases"]:
        case = entry["case"]
        yield ""
        yield (
            f"{case['kind']}: {case['tokens']} + {case['targets']} tokens, {case['layers']} layers "
            f"x {case['hidden']}, window {case['window']}, vocabulary {case['vocab']}, "
            f"{case['precision']}, recompute {case['recompute']}; "
            f"load {entry['load_average'][0]:.1f} before"
        )
        yield (
            f"{'':14}{'s/step':>9}{'tokens/s':>10}{'x theirs':>10}"
            f"{'step MiB':>10}{'whole MiB':>11}{'peak MiB':>10}"
        )
        for name, row in entry["contenders"].items():
            yield _row(name, row, entry["ratios"])
        for rule in entry["must_hold"]:
            verdict = "holds" if rule["holds"] else "DOES NOT HOLD"
            yield f"{rule['rule']}: {rule['found']:.2f} ({verdict})"
    yield ""
    yield "MiB of ours are of the larger rank; step: beyond the built model and engine"


def _row(name: str, row: dict[str, Any], ratios: dict[str, float]) -> str:
    if row["note"]:
        return f"{name:14} left out: {row['note']}"
    ratio = ratios.get(f"tokens_per_second, {name}")
    weights = [max(row[key]) for key in WEIGHTS]
    return (
        f"{name:14}{row['seconds_per_step']:9.2f}{row['tokens_per_second']:10.0f}"
        f"{'-' if ratio is None else f'{ratio:.2f}':>10}"
        f"{weights[0]:10.0f}{weights[1]:11.0f}{weights[2]:10.0f}"
    )


def write_picture(report: dict[str, Any], path: Path) -> str | None:
    """Draw tokens per second and memory over N, a row per kind of model.

    Args:
        report: Of ``bench_step.measure``.
        path: The PNG to write.

    Returns:
        None when the file was written, else why not, in a sentence.
    """
    try:
        # An extra: measuring does not need it.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: matplotlib is missing; pip install 'haloformer[demo]'"
    kinds = list(dict.fromkeys(entry["case"]["kind"] for entry in report["cases"]))
    figure = Figure(figsize=(11, 4.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("tokens_per_second", "tokens/s"), ("step_growth_mib", "growth of a step, MiB"))
    grid = figure.subplots(len(kinds), len(panels), squeeze=False)
    for kind, row in zip(kinds, grid, strict=True):
        entries = [entry for entry in report["cases"] if entry["case"]["kind"] == kind]
        for axes, (key, label) in zip(row, panels, strict=True):
            _draw(axes, entries, key)
            axes.set_title(kind)
            axes.set_ylabel(label)
    figure.suptitle(report["device"])
    figure.savefig(path, dpi=110)
    return None


def _draw(axes: Any, entries: list[dict[str, Any]], key: str) -> None:
    """One line per contender; memory of ours is that of the larger rank."""
    for name in entries[0]["contenders"]:
        points = [
            (entry["case"]["tokens"], row[key])
            for entry in entries
            if not (row := entry["contenders"][name])["note"]
        ]
        if points:
            values = [max(y) if isinstance(y, list) else y for _, y in points]
            label = name if name == THEIRS else f"ours, {name}"
            axes.plot([n for n, _ in points], values, "o-", label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the sequence")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
