"""The report of ``haloformer bench attention`` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def table(report: dict[str, Any]) -> Iterator[str]:
    """Lines of the report for a terminal.

    Args:
        report: Of ``bench.measure``.
    """
    settings, versions = report["settings"], report["versions"]
    yield f"{report['device']}, {settings['threads']} threads, torch {versions['torch']}"
    yield (
        f"window {settings['window']}, {settings['num_heads']} heads of {settings['head_dim']}, "
        f"float32, batch 1, backend {settings['backend']}; parity: {report['parity']}"
    )
    for check in report["parity_checks"]:
        error = check["note"] if check["error"] is None else f"error {check['error']:.1e}"
        yield f"  {check['name']}: {error}"
    titles = f"{'fwd ms':>9}{'x floor':>9}{'x ours':>8}{'f+b ms':>10}{'x floor':>9}{'x ours':>8}"
    for floor in report["floor"]:
        yield ""
        yield f"N = {floor['n']}, matrix products at {floor['gemm_gflops']:.0f} GFLOP/s"
        yield f"{'':22}{titles}{'peak MiB':>10}"
        yield f"{'floor':22}{floor['fwd_ms']:9.1f}{'':17}{floor['fwd_bwd_ms']:10.1f}"
        for row in report["results"]:
            if row["n"] == floor["n"]:
                yield _row(row)
    yield ""
    for entry in report["must_hold"]:
        verdict = "holds" if entry["holds"] else "DOES NOT HOLD"
        yield (
            f"{entry['name']:16} N={entry['n']}  fwd {entry['fwd']:.2f}  "
            f"fwd+bwd {entry['fwd_bwd']:.2f}  ({entry['rule']}: {verdict})"
        )


def _row(row: dict[str, Any]) -> str:
    columns = (
        ("fwd_ms", 9, 1),
        ("fwd_over_floor", 9, 2),
        ("fwd_over_ours", 8, 2),
        ("fwd_bwd_ms", 10, 1),
        ("fwd_bwd_over_floor", 9, 2),
        ("fwd_bwd_over_ours", 8, 2),
        ("peak_growth_mib", 10, 0),
    )
    cells = (
        f"{'-':>{width}}" if row[key] is None else f"{row[key]:{width}.{digits}f}"
        for key, width, digits in columns
    )
    note = f"  {row['note']}" if row["note"] else ""
    return f"{row['contender']:22}{''.join(cells)}{note}"


def write_picture(report: dict[str, Any], path: Path) -> str | None:
    """Draw time and memory over N on linear axes, where a straight line is linear cost.

    Args:
        report: Of ``bench.measure``.
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
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("fwd_ms", "forward, ms"),
        ("fwd_bwd_ms", "forward and backward, ms"),
        ("peak_growth_mib", "peak memory growth, MiB"),
    )
    names = list(dict.fromkeys(row["contender"] for row in report["results"]))
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            rows = [r for r in report["results"] if r["contender"] == name and r[key] is not None]
            if rows:
                axes.plot([r["n"] for r in rows], [r[key] for r in rows], "o-", label=name)
        if key != "peak_growth_mib":
            points = [(f["n"], f[key]) for f in report["floor"]]
            axes.plot(*zip(*points, strict=True), "k--", label="floor")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"window {report['settings']['window']}, {report['device']}")
    figure.savefig(path, dpi=120)
    return None
