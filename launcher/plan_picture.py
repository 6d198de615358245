"""Which rank holds what: the layout as text, and as a PNG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from haloformer.launcher.plan_layouts import Judged

_MOST_COLUMNS = 8


def picture(one: Judged, per_node: int) -> Iterator[str]:
    """Lines: a row per data-parallel rank, a box per context rank, its tensor ranks within.

    ::

        data 0   [0,1] rows 0-255 <-> [2,3] rows 256-511         node 0
    """
    split, n = one.split, one.rows.source
    yield "ranks: [tensor ranks] rows of the sequence; <-> halo within a node, <=> between nodes"
    for data in (0, 1) if split.data > 1 else (0,):
        boxes = []
        for context in range(min(split.context, _MOST_COLUMNS)):
            first = (data * split.context + context) * split.tensor
            last = first + split.tensor - 1
            ranks = str(first) if split.tensor == 1 else f"{first}-{last}"
            link = ""
            if context:
                same = (first - 1) // per_node == first // per_node
                link = " <-> " if same else " <=> "
            boxes.append(f"{link}[{ranks}] rows {context * n}-{(context + 1) * n - 1}")
        more = f" ... {split.context} context ranks" if split.context > _MOST_COLUMNS else ""
        start = data * split.context * split.tensor
        nodes = (start // per_node, (start + split.context * split.tensor - 1) // per_node)
        where = f"node {nodes[0]}" if nodes[0] == nodes[1] else f"nodes {nodes[0]}-{nodes[1]}"
        yield f"  data {data}  {''.join(boxes)}{more}   {where}"
    if split.data > 2:
        yield f"  ... data {split.data - 1}"


def write_png(one: Judged, per_node: int, path: Path) -> str | None:
    """Draw every rank as a box on its node, coloured by the sequence it works on.

    Returns:
        None when the file was written, else why not, in a sentence.
    """
    try:
        # An extra: planning does not need it.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        return "not drawn: matplotlib is missing; pip install 'haloformer[demo]'"
    split, n = one.split, one.rows.source
    nodes = min(-(-split.world // per_node), 16)
    figure = Figure(figsize=(1.2 * per_node + 2, 0.9 * nodes + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for rank in range(min(split.world, nodes * per_node)):
        node, slot = divmod(rank, per_node)
        context = rank // split.tensor % split.context
        data = rank // (split.tensor * split.context)
        color = f"C{data % 10}"
        axes.add_patch(Rectangle((slot, -node), 0.9, 0.8, facecolor=color, alpha=0.35))
        label = f"{rank}\n{context * n}-{(context + 1) * n - 1}"
        axes.text(slot + 0.45, 0.4 - node, label, ha="center", va="center", fontsize=7)
        if context + 1 < split.context and split.tensor == 1 and slot + 1 < per_node:
            arrow = {"arrowstyle": "<->", "lw": 0.8}
            axes.annotate(
                "", (slot + 1.05, 0.7 - node), (slot + 0.85, 0.7 - node), arrowprops=arrow
            )
    axes.set_xlim(-0.2, per_node)
    axes.set_ylim(0.8 - nodes, 1)
    axes.set_yticks([0.4 - node for node in range(nodes)], [f"node {k}" for k in range(nodes)])
    axes.set_xticks([])
    sizes = f"DP {split.data} x CP {split.context} x TP {split.tensor}"
    axes.set_title(f"{sizes}: rank and its rows; one colour per sequence, arrows are halos")
    figure.savefig(path, dpi=120)
    return None
