"""A forecast as JSON, and as text for a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from haloformer.configs.schema import Phase
from haloformer.launcher.plan_layouts import Cluster, Judged
from haloformer.launcher.plan_time import Place

_MIB, _GIB = 2**20, 2**30


def phase_json(phase: Phase) -> dict[str, Any]:
    """Schedule of one phase."""
    config = phase.config
    data, optim = config.data, config.optim
    tokens = config.batch.global_batch * (data.seq_len + (data.target_len or 0))
    windows = getattr(config.model, "attention_window", None)
    return {
        "name": phase.name,
        "steps": config.steps,
        "seq_len": data.seq_len,
        "target_len": data.target_len,
        "attention_window": windows,
        "dilation": getattr(config.model, "dilation", 1),
        "learning_rate": optim.learning_rate,
        "warmup_steps": optim.warmup_steps,
        "schedule": optim.schedule,
        "global_batch": config.batch.global_batch,
        "tokens_per_step": tokens,
        "tokens": tokens * config.steps,
    }


def layout_json(one: Judged, per_node: int) -> dict[str, Any]:
    """One layout with its memory, its bytes per link and its time."""
    split, time = one.split, one.time
    return {
        "data": split.data,
        "context": split.context,
        "tensor": split.tensor,
        "zero_stage": split.zero_stage,
        "recompute": split.recompute,
        "micro_batch": split.micro_batch,
        "accumulation": one.accumulation,
        "fits": one.fits,
        "peak_bytes": one.peak.total,
        "peak_moment": one.peak.name,
        "memory_bytes": dict(one.peak.held),
        "link_bytes": link_bytes(one, per_node),
        "step_seconds": time.total,
        "seconds": {
            "products": time.products,
            "elements": time.elements,
            "exposed": time.exposed,
            "hidden": time.hidden,
        },
        "tokens_per_second": one.tokens_per_second,
    }


def link_bytes(one: Judged, per_node: int) -> dict[str, dict[str, int]]:
    """Bytes that one rank sends per step, by kind: within its node, and over the network."""
    place = Place(one.split, per_node)
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"node": 0, "network": 0})
    for flow in one.flows:
        node, network = place.link_bytes(one.rank, flow)
        found[flow.kind]["node"] += node
        found[flow.kind]["network"] += network
    return dict(found)


def text(report: dict[str, Any], cluster: Cluster) -> Iterator[str]:
    """The report of ``plan_command`` in lines."""
    yield f"{report['name']}: {report['parameters']:,} parameters, {report['precision']}"
    yield from _schedule(report["phases"])
    own = report["recipe"]
    yield ""
    yield f"memory per rank at the fullest moment ({own['peak_moment']})"
    for kind, size in own["memory_bytes"].items():
        yield f"  {kind:<14} {size / _GIB:8.2f} GiB"
    room = cluster.shares.memory * cluster.device.memory / _GIB
    word = "fits" if own["fits"] else "DOES NOT FIT"
    yield f"  {'in all':<14} {own['peak_bytes'] / _GIB:8.2f} GiB of {room:.1f} usable: {word}"
    yield ""
    yield f"one rank sends per step{'':<11} within the node      over the network"
    for kind, sent in own["link_bytes"].items():
        node, network = (sent[link] / _MIB for link in ("node", "network"))
        yield f"  {kind:<24} {node:14.2f} MiB {network:17.2f} MiB"
    yield ""
    yield from _time(report, own)
    yield from _layouts(report)
    yield from _scaling(report)


def _schedule(phases: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    wide = max(len("phase"), *(len(phase["name"]) for phase in phases))
    yield (
        f"{'phase':<{wide}}  steps   seq_len  batch  rate (warm-up)         tokens/step      tokens"
    )
    for phase in phases:
        rate = f"{phase['learning_rate']:g} ({phase['warmup_steps']}) {phase['schedule']}"
        yield (
            f"{phase['name']:<{wide}} {phase['steps']:>6} {phase['seq_len']:>8} "
            f"{phase['global_batch']:>6}  {rate:<22} {phase['tokens_per_step']:>11,} "
            f"{phase['tokens']:>11.3g}"
        )
        yield f"  windows {_short(phase['attention_window'])}, dilation {_short(phase['dilation'])}"


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"{value[0]} (bottom) .. {value[-1]} (top)" if len(set(value)) > 1 else str(value[0])


def _time(report: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    seconds = own["seconds"]
    yield f"{report['flops_per_step']:.3g} FLOPs per step (forward and backward)"
    yield f"a step takes {1e3 * own['step_seconds']:.1f} ms: " + ", ".join(
        f"{name} {1e3 * value:.1f}"
        for name, value in (
            ("products", seconds["products"]),
            ("element-wise", seconds["elements"]),
            *((f"exposed {kind}", value) for kind, value in seconds["exposed"].items()),
        )
    )
    yield f"  {own['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu']:.2f}"
    taken = report["assumptions"]
    yield (
        f"  model, not measured; taken to be reached: {taken['products']:.0%} of the peak, "
        f"{taken['bandwidth']:.0%} of the memory's bandwidth, {taken['links']:.0%} of a link's, "
        f"{1e6 * taken['latency']:.0f} us per message"
    )


def _layouts(report: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "layouts that fit, fastest first (* the recipe's)"
    yield "    DP   CP   TP  ZeRO  recompute  micro   GiB/rank   ms/step     tokens/s"
    for one in report["layouts"]:
        mark = "*" if one["is_recipe"] else " "
        yield (
            f"{mark} {one['data']:>4} {one['context']:>4} {one['tensor']:>4} "
            f"{one['zero_stage']:>5}  {one['recompute']:<10} {one['micro_batch']:>5} "
            f"{one['peak_bytes'] / _GIB:>10.1f} {1e3 * one['step_seconds']:>9.1f} "
            f"{one['tokens_per_second']:>12,.0f}"
        )
    yield f"the first: {report['why']}"


def _scaling(report: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "weak scaling of the recipe's layout (model, not measured)"
    yield "  devices   global batch   ms/step       tokens/s   efficiency"
    for row in report["weak_scaling"]:
        yield (
            f"  {row['world']:>7} {row['global_batch']:>14} {1e3 * row['step_seconds']:>9.1f} "
            f"{row['tokens_per_second']:>14,.0f} {row['efficiency']:>11.2f}"
        )
