"""How long a step takes, from what it computes, moves and sends: a model, not a measurement.

::

    matrix products  |############|                    FLOPs / (share of the peak)
    element by element            |####|               bytes / (share of the bandwidth)
    messages                           |##|            those that nothing hides
    halo              ....                             beside the interior rows

Kernels of one stream follow one another, so the first two add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from haloformer.launcher.plan_activations import attention_kept, feed_kept, head_of
from haloformer.launcher.plan_devices import Device, Shares
from haloformer.launcher.plan_flops import Work, forward_flops
from haloformer.launcher.plan_model import FP32, Model, Rows, Split, parts_of
from haloformer.launcher.plan_traffic import Flow

# An activation is written, read by the next operation and by the backward, and its gradient is
# written and read.
_PASSES_OF_ACTIVATIONS = 5


@dataclass(frozen=True)
class Place:
    """Where ranks sit: tensor ranks side by side, then context, then data, node after node.

    Attributes:
        split: Sizes of the mesh axes.
        per_node: Devices of a node.
    """

    split: Split
    per_node: int

    def members_on_node(self, group: str) -> int:
        """Ranks of one group on the node that has the most of them."""
        stride, size = self.stride_and_size(group)
        return max(min(size, self.per_node // stride), 1)

    def stride_and_size(self, group: str) -> tuple[int, int]:
        """Distance of neighbours in a group, and how many it has."""
        split = self.split
        if group == "tensor":
            return 1, split.tensor
        return split.tensor, split.context if group == "context" else split.zero_ranks

    def crosses(self, rank: int, flow: Flow) -> bool:
        """Whether a message between two ranks leaves the node."""
        other = rank + flow.hop * self.split.tensor
        return rank // self.per_node != other // self.per_node

    def link_bytes(self, rank: int, flow: Flow) -> tuple[int, int]:
        """What a rank sends within its node and over the network.

        A ring that passes several members of a node leaves it once, through the adapters of all
        of them.
        """
        _, size = self.stride_and_size(flow.group)
        sent = flow.wire_bytes(size)
        if flow.operation == "send":
            return (0, sent) if self.crosses(rank, flow) else (sent, 0)
        here = self.members_on_node(flow.group)
        if here >= size:
            return sent, 0
        return sent * (here - 1) // here, sent // here


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to.

    Attributes:
        products: Matrix products, those computed again included.
        elements: What is done element by element, and the optimizer.
        exposed: Messages that nothing hides, by kind.
        hidden: Messages beside computation, by kind.
    """

    products: float
    elements: float
    exposed: dict[str, float]
    hidden: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.products + self.elements + sum(self.exposed.values())


def rank_flops(model: Model, rows: Rows, split: Split) -> float:
    """Forward operations of one rank: its share of the layers' products.

    Every context rank attends with all target rows over its own source rows.
    """
    source, target = rows.batch * rows.source, rows.batch * rows.target
    every = rows.target * split.context  # target rows of a sequence
    work = Work(
        source,
        rows.num_globals,
        rows.predicted,
        target,
        pairs=source * every,
        seen=target * (every + 1) / 2,
    )
    return forward_flops(model, work) / split.tensor


def step_time(
    model: Model,
    rows: Rows,
    split: Split,
    accumulation: int,
    flows: Sequence[Flow],
    place: Place,
    device: Device,
    shares: Shares,
    rank: int = 0,
) -> StepTime:
    """The step of one rank; all wait for the slowest.

    Args:
        model: What is trained.
        rows: Of one forward pass.
        split: How the ranks share the work.
        accumulation: Forward passes per step.
        flows: Of :func:`haloformer.launcher.plan_traffic.traffic`.
        place: Where the ranks sit.
        device: What they run on.
        shares: What is reached of it.
        rank: Which rank.
    """
    forward = rank_flops(model, rows, split)
    again = {"none": 0.0, "selective": _feed_share(model), "full": 1.0}[split.recompute]
    speed = shares.products * device.peak(split.width)
    products = accumulation * forward * (3.0 + again) / speed
    elements = _element_bytes(model, rows, split, accumulation) / (
        shares.bandwidth * device.bandwidth
    )
    exposed: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    inner = accumulation * _interior(model, rows, split) / speed
    for flow in flows:
        node, network = place.link_bytes(rank, flow)
        seconds = max(node / device.node_link, network / device.network) / shares.links
        seconds += flow.calls * shares.latency
        beside = 0.0
        if flow.kind in ("halo", "halo gradients"):
            # Rows that reach no border are computed meanwhile; the backward has twice as many.
            beside = inner * (2.0 if flow.kind == "halo gradients" else 1.0 + (again == 1.0))
        elif flow.kind == "weights" and split.zero_stage == 3:
            beside = products  # DeepSpeed fetches the next layer's ahead
        exposed[flow.kind] += max(seconds - beside, 0.0)
        hidden[flow.kind] += min(seconds, beside)
    return StepTime(products, elements, dict(exposed), dict(hidden))


def _feed_share(model: Model) -> float:
    """The feed-forward halves' share of the layers' products, as selective recompute repeats it."""
    size = model.hidden
    feed = sum(2 * size * layer.ffn for layer in model.layers)
    rest = sum((6 if layer.kind == "decoder" else 4) * size * size for layer in model.layers)
    return feed / (feed + rest)


def _interior(model: Model, rows: Rows, split: Split) -> float:
    """Operations of one forward pass on rows whose windows stay on the rank."""
    flops = 0.0
    for layer in model.layers:
        if layer.spec is None:
            continue
        inside = max(rows.source - layer.reach, 0)
        flops += 4 * model.hidden * rows.batch * inside * layer.mean_band / split.tensor
    return flops


def _element_bytes(model: Model, rows: Rows, split: Split, accumulation: int) -> float:
    """Bytes to and from memory beside the matrix products' own."""
    kept = sum(
        sum(attention_kept(model, layer, rows, split).values())
        + sum(feed_kept(model, layer, rows, split).values())
        for layer in model.layers
    )
    head = head_of(model, rows, split)
    passes = _PASSES_OF_ACTIVATIONS + {"none": 0, "selective": 1, "full": 2}[split.recompute]
    moved = accumulation * (passes * kept + _PASSES_OF_ACTIVATIONS * (head.kept + head.added))
    weights = sum(part.elements for part in parts_of(model, split.tensor))
    # Read forward and backward, gradients written; then AdamW reads four and writes three values
    # per element that it steps.
    moved += accumulation * 3 * weights * split.width
    stepped = weights if split.zero_stage == 0 else weights / split.zero_ranks
    return moved + 7 * FP32 * stepped
