"""The loss curve of a run as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_curve(records: list[dict[str, Any]], title: str, path: Path) -> str | None:
    """Draw the loss over steps, in training and held out; bits per character where known.

    Args:
        records: Of ``RunDir.read_metrics``.
        title: Name of the recipe.
        path: The PNG to write.

    Returns:
        None when the file was written, else why not, in a sentence.
    """
    key, unit = "loss", "nats per target token"
    if any("bits_per_char" in record for record in records):
        key, unit = "bits_per_char", "bits per character of the target tokens"
    train = [(r["step"], r[key]) for r in records if key in r]
    held_out = [(r["step"], r[f"eval_{key}"]) for r in records if f"eval_{key}" in r]
    if not train:
        return "no step was finished"
    try:
        # An extra: training does not need it.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: matplotlib is missing; pip install 'haloformer[demo]'"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), label="training batch", color="tab:blue", linewidth=1.2)
    if held_out:
        steps, bits = zip(*held_out, strict=True)
        axes.plot(steps, bits, "o--", label="held out", color="tab:orange")
        for step, value in held_out:
            axes.annotate(f"{value:.2f}", (step, value), xytext=(4, 6), textcoords="offset points")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        path.unlink(missing_ok=True)  # half of a picture
        return f"not written: {error.strerror}"
    return None
