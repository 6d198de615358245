"""Every layout of a recipe on a cluster, judged by memory and by the time of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.plan_devices import Device, Shares
from haloformer.launcher.plan_memory import Moment, memory
from haloformer.launcher.plan_model import Model, Rows, Split, rows_of
from haloformer.launcher.plan_time import Place, StepTime, step_time
from haloformer.launcher.plan_traffic import Flow, traffic


@dataclass(frozen=True)
class Cluster:
    """What is to be rented.

    Attributes:
        world: Devices in all.
        per_node: Devices of a node.
        device: Which.
        shares: What a step is taken to reach of it.
    """

    world: int
    per_node: int
    device: Device
    shares: Shares


@dataclass(frozen=True)
class Judged:
    """One layout.

    Attributes:
        split: Which.
        rows: Of one forward pass of a rank.
        accumulation: Forward passes per step.
        peak: The moment of a step that holds most.
        time: Of a step.
        tokens: Read and written per step by all ranks.
        flows: What the busiest rank hands over.
        rank: That rank.
        fits: Whether the device holds it.
    """

    split: Split
    rows: Rows
    accumulation: int
    peak: Moment
    time: StepTime
    tokens: int
    flows: list[Flow]
    rank: int
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.time.total


def judge(
    config: TrainConfig, model: Model, split: Split, num_globals: int, cluster: Cluster
) -> Judged:
    """Memory and time of one layout that divides the global batch.

    Args:
        config: Of one phase.
        model: Its numbers.
        split: The layout.
        num_globals: Global tokens per sequence.
        cluster: Where it runs.
    """
    batch = config.batch.global_batch
    accumulation = batch // (split.data * split.micro_batch)
    rows = rows_of(config, split, num_globals)
    place = Place(split, cluster.per_node)
    peak = memory(model, rows, split, accumulation).peak
    # A rank in the middle sends halos to both sides; the last tensor rank's heads reach farthest.
    middle, last = split.context // 2, split.tensor - 1
    flows = traffic(model, rows, split, accumulation, middle, last)
    rank = _border_rank(split, cluster.per_node)
    time = step_time(
        model, rows, split, accumulation, flows, place, cluster.device, cluster.shares, rank
    )
    tokens = batch * (config.data.seq_len + (config.data.target_len or 0))
    fits = peak.total <= cluster.shares.memory * cluster.device.memory
    return Judged(split, rows, accumulation, peak, time, tokens, flows, rank, fits)


def _border_rank(split: Split, per_node: int) -> int:
    """A context rank whose right neighbour sits on another node, if there is such."""
    if split.context * split.tensor <= per_node:
        return split.context // 2 * split.tensor
    return per_node - 1


def layouts(config: TrainConfig, model: Model, recipe: Split, cluster: Cluster) -> Iterator[Split]:
    """Layouts that divide the batch, the heads and the features: all that could be asked for."""
    sizes = [n for layer in model.layers for n in (layer.heads, layer.ffn)]
    common = math.gcd(*sizes, cluster.per_node)
    stages = (1, 2, 3) if recipe.width == 2 else (0, 1, 2, 3)
    for tensor in _divisors(common):
        for context in _divisors(cluster.world // tensor) if cluster.world % tensor == 0 else []:
            data = cluster.world // tensor // context
            if config.batch.global_batch % data or context > config.data.seq_len:
                continue
            for micro in _divisors(config.batch.global_batch // data):
                for stage in stages:
                    for recompute in ("none", "selective", "full"):
                        yield replace(
                            recipe,
                            data=data,
                            context=context,
                            tensor=tensor,
                            micro_batch=micro,
                            zero_stage=stage,
                            recompute=recompute,
                        )


def ranked(
    config: TrainConfig, model: Model, recipe: Split, num_globals: int, cluster: Cluster
) -> list[Judged]:
    """Layouts that fit, fastest first; the recipe's is among them even if it is an odd one."""
    splits = list(layouts(config, model, recipe, cluster))
    if recipe not in splits:  # its tensor ranks sit on several nodes, for example
        splits.append(recipe)
    found = (judge(config, model, split, num_globals, cluster) for split in splits)
    return sorted((one for one in found if one.fits), key=lambda one: one.time.total)


def why(best: Judged, own: Judged) -> str:
    """What the best layout spares beside the recipe's, in one line."""
    if best.split == own.split:
        return "the recipe's own layout is the fastest that fits"
    parts = {
        "matrix products": own.time.products - best.time.products,
        "element-wise work": own.time.elements - best.time.elements,
    }
    for kind in own.time.exposed.keys() | best.time.exposed.keys():
        parts[kind] = own.time.exposed.get(kind, 0.0) - best.time.exposed.get(kind, 0.0)
    most = max(parts, key=lambda part: parts[part])
    fits = "" if own.fits else "; the recipe's does not fit"
    return f"it spares {1e3 * parts[most]:.1f} ms of {most} per step{fits}"


def scaling(
    config: TrainConfig, model: Model, own: Judged, num_globals: int, cluster: Cluster
) -> list[Judged]:
    """The recipe's layout with ever more data-parallel ranks and as much work for each."""
    unit = own.split.context * own.split.tensor
    worlds = [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size % unit == 0]
    per_data = config.batch.global_batch // own.split.data
    table = []
    for world in worlds:
        data = world // unit
        batch = config.batch.model_copy(update={"global_batch": per_data * data})
        grown = config.model_copy(update={"batch": batch})
        split = replace(own.split, data=data)
        table.append(judge(grown, model, split, num_globals, replace(cluster, world=world)))
    return table


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
