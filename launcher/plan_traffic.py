"""What one rank hands to its groups in one optimizer step, message by message.

The halo of a layer, for 3 context ranks of n=4 rows and a reach of 2 to the left, 1 to the right::

    forward      rank 0 --2 rows--> rank 1 --2 rows--> rank 2      last rows, of K and of V
                 rank 0 <--1 row--- rank 1 <--1 row--- rank 2      first rows
    backward     the same rows the other way, as gradients

Each function is the twin of one in ``kernels`` or ``model``, or of what DeepSpeed and megatron-core
do; the tests count the messages of real steps and find these bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from haloformer.launcher.plan_model import (
    BUCKET,
    FP32,
    Layer,
    Model,
    Part,
    Rows,
    Split,
    parts_of,
)

Group = Literal["context", "tensor", "zero"]
Operation = Literal["send", "all_reduce", "all_gather", "reduce_scatter"]
# DeepSpeed keeps so many gathered elements and gathers again what does not fit (its default).
_MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Flow:
    """Messages of one kind that one rank hands over per optimizer step.

    Attributes:
        kind: For people.
        group: Who talks.
        operation: How.
        size: Bytes: of what is sent; of the tensor that is summed; of the whole that is gathered
            or scattered.
        calls: In how many messages.
        hop: For ``send``: how many ranks further, negative to lower ranks.
    """

    kind: str
    group: Group
    operation: Operation
    size: int
    calls: int
    hop: int = 0

    def wire_bytes(self, group_size: int) -> int:
        """What this rank sends over links when the group does it in a ring."""
        if self.operation == "send":
            return self.size
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.size * (group_size - 1) // group_size


def traffic(
    model: Model, rows: Rows, split: Split, accumulation: int, context_rank: int, tensor_rank: int
) -> list[Flow]:
    """Everything that one rank hands over in one optimizer step.

    Args:
        model: What is trained.
        rows: Of one forward pass.
        split: How the ranks share the work.
        accumulation: Forward passes per step.
        context_rank: Its place along the sequence: the first and the last send halos to one side.
        tensor_rank: Its heads, which need not all reach as far.
    """
    flows: list[Flow] = []
    if split.context > 1:
        for layer in model.layers:
            if layer.kind == "decoder":
                flows += decoder_flows(model, layer, rows, split)
            else:
                flows += halo_flows(model, layer, rows, split, context_rank, tensor_rank)
                flows += global_flows(model, layer, rows, split)
    if split.tensor > 1:
        flows += tensor_flows(model, rows, split)
    flows = [
        replace(flow, size=flow.size * accumulation, calls=flow.calls * accumulation)
        for flow in flows
    ]
    if split.zero_ranks > 1:
        flows += zero_flows(model, split, accumulation)
    return [flow for flow in flows if flow.size]


def _forward_passes(split: Split) -> int:
    """How often a layer's exchanges run before its backward is done."""
    return 2 if split.recompute == "full" else 1


def halo_rows(rank: int, ranks: int, n: int, left: int, right: int) -> dict[int, int]:
    """Rows that a rank sends forward, by hop: those that others' windows reach into.

    Args:
        rank: This rank.
        ranks: Ranks along the sequence.
        n: Rows per rank.
        left: How far windows reach to the left.
        right: How far to the right.
    """
    sent = {}
    for hop in range(1, ranks):
        if rank + hop < ranks:  # its windows reach back into my last rows
            sent[hop] = max(min(n, left - (hop - 1) * n), 0)
        if rank - hop >= 0:
            sent[-hop] = max(min(n, right - (hop - 1) * n), 0)
    return {hop: count for hop, count in sent.items() if count}


def halo_flows(
    model: Model, layer: Layer, rows: Rows, split: Split, context_rank: int, tensor_rank: int
) -> Iterator[Flow]:
    """K and V of the windows, and their gradients; each group of heads as far as it reaches."""
    assert layer.spec is not None
    heads = layer.heads // split.tensor
    spec = layer.spec.select(range(tensor_rank * heads, (tensor_rank + 1) * heads))
    head_dim = model.hidden // layer.heads
    for group in spec.groups_by_reach():
        own = spec.select(group)
        row = 2 * rows.batch * len(group) * head_dim * split.width  # K and V
        reach = (own.reach_left, own.reach_right)
        sent = halo_rows(context_rank, split.context, rows.source, *reach)
        for hop, count in sent.items():
            passes = _forward_passes(split)
            yield Flow("halo", "context", "send", passes * count * row, passes, hop)
        # Gradients go home to whom rows came from: the rows that I need to the left and right
        # are those that I would send with both sides exchanged.
        home = halo_rows(context_rank, split.context, rows.source, reach[1], reach[0])
        for hop, count in home.items():
            yield Flow("halo gradients", "context", "send", count * row, 1, hop)


def global_flows(model: Model, layer: Layer, rows: Rows, split: Split) -> Iterator[Flow]:
    """Rows of the global tokens, gathered; their answers, merged."""
    count = rows.batch * rows.num_globals
    if count == 0:
        return
    heads, size = layer.heads // split.tensor, model.hidden // split.tensor
    width, passes = split.width, _forward_passes(split)
    answer = answer_features(model, layer, rows, split)
    gathered = count * (model.hidden + 2 * size)  # hidden states; K and V
    # A maximum, then the answer with its weight, per head, in fp32.
    merged = count * heads * (1 + answer + 1)
    size_forward = passes * (gathered * width + merged * FP32)
    yield Flow("globals", "context", "all_reduce", size_forward, 4 * passes)
    yield Flow("globals", "context", "all_reduce", (gathered + count * heads * answer) * FP32, 3)


def answer_features(model: Model, layer: Layer, rows: Rows, split: Split) -> int:
    """Features of a global row's answer per head: folded, averaged hidden states and a weight."""
    if split.tensor == 1 and rows.num_globals * layer.heads < model.hidden:
        return model.hidden + 1
    return model.hidden // layer.heads


def decoder_flows(model: Model, layer: Layer, rows: Rows, split: Split) -> Iterator[Flow]:
    """Self-attention gathers K and V; cross-attention gathers queries and merges answers."""
    count = rows.batch * rows.target * split.context  # all target rows
    heads, size = layer.heads // split.tensor, model.hidden // split.tensor
    head_dim, passes = model.hidden // layer.heads, _forward_passes(split)
    gathered = count * 3 * size  # K and V of self-attention, queries of cross-attention
    merged = count * heads * (1 + head_dim + 1)
    size_forward = passes * (gathered * split.width + merged * FP32)
    yield Flow("decoder", "context", "all_reduce", size_forward, 4 * passes)
    # Gradients of what was gathered, and of the merged answers.
    yield Flow("decoder", "context", "all_reduce", (gathered + count * size) * FP32, 3)


def tensor_flows(model: Model, rows: Rows, split: Split) -> Iterator[Flow]:
    """megatron-core's sums: outputs of row linears, input gradients of column linears."""
    row = rows.batch * model.hidden * split.width
    source, target, globals_ = (n * row for n in (rows.source, rows.target, rows.num_globals))
    # The token embedding, of source and target.
    yield Flow("tensor forward", "tensor", "all_reduce", source + target, 1 + model.has_decoder)
    for layer in model.layers:
        forward, backward = _tensor_sums(layer, source, target, globals_, split)
        yield Flow("tensor forward", "tensor", "all_reduce", sum(forward), len(forward))
        yield Flow("tensor backward", "tensor", "all_reduce", sum(backward), len(backward))
    if model.scores_vocabulary:
        # The tied head's input, and of the loss a maximum and two sums per row in fp32.
        head = rows.predicted * model.hidden * split.width
        yield Flow("tensor backward", "tensor", "all_reduce", head, 1)
        yield Flow("loss", "tensor", "all_reduce", 3 * rows.predicted * FP32, 3)


def _tensor_sums(
    layer: Layer, source: int, target: int, globals_: int, split: Split
) -> tuple[list[int], list[int]]:
    """Bytes of each sum of one layer, forward and backward.

    Args:
        layer: Which.
        source: Bytes of the hidden states of the source rows.
        target: Of the target rows.
        globals_: Of the global rows.
        split: How the ranks share the work.
    """
    own = target if layer.kind == "decoder" else source
    halves = [own, own] if layer.kind == "decoder" else [own]  # self and cross, or one attention
    # Query, key, value and the inner linear; then the global twins, or those of cross-attention.
    backward = [own] * 4
    if layer.kind == "encoder":
        backward += [globals_, source, source]
    elif layer.kind == "decoder":
        backward += [target, source, source]
    again = {"none": [], "selective": [own], "full": [*halves, own]}[split.recompute]
    # A recompute stops at the last tensor that the backward needs, which without dropout is in
    # front of a pre-norm layer's last sum.
    if again and layer.kind == "char" and layer.hidden_dropout == 0.0:
        again = again[:-1]
    return [*halves, own, *again], backward


def zero_flows(model: Model, split: Split, accumulation: int) -> Iterator[Flow]:
    """DeepSpeed's gradients and weights. Its scalars (norm, overflow) are left out: 32 bytes."""
    parts, ranks, width = parts_of(model, split.tensor), split.zero_ranks, split.width
    whole = sum(part.elements for part in parts)
    padded = sum(flat_groups(parts, ranks))
    if split.zero_stage == 3:
        yield from _zero3_flows(model, parts, split, accumulation)
        return
    # Summed in fp32 whatever the weights are; ZeRO-2 does so after every forward pass. In bf16
    # ZeRO-1 is another optimizer of DeepSpeed's, which sums its padding as well.
    summed = padded if split.zero_stage == 1 and width != FP32 else whole
    times = accumulation if split.zero_stage == 2 else 1
    calls = times * -(-summed // BUCKET)
    yield Flow("gradients", "zero", "all_reduce", times * summed * FP32, calls)
    if split.zero_stage > 0:
        yield Flow("weights", "zero", "all_gather", padded * width, 2)


def _zero3_flows(
    model: Model, parts: list[Part], split: Split, accumulation: int
) -> Iterator[Flow]:
    """Every parameter is split by itself; vectors stay whole on every rank between steps."""
    ranks = split.zero_ranks
    sizes = [size for part in parts for size, _ in part.sizes]
    split_up = [-(-size // ranks) * ranks for size in sizes]
    kept = sum(
        padded for size, padded in zip(sizes, split_up, strict=True) if size <= model.vector_limit
    )
    fetched = sum(split_up) - kept
    # What was gathered for the forward pass stays for the backward, if it is not too much.
    passes = accumulation * (1 if sum(sizes) <= _MAX_LIVE else 2)
    buckets = -(-sum(sizes) // BUCKET)
    gathered = (passes * fetched + kept) * split.width
    yield Flow("weights", "zero", "all_gather", gathered, passes * buckets + 1)
    scattered = accumulation * sum(split_up) * FP32
    yield Flow("gradients", "zero", "reduce_scatter", scattered, accumulation * buckets)


def flat_groups(parts: list[Part], ranks: int) -> list[int]:
    """Elements of DeepSpeed's flat groups, matrices and vectors apart, padded for the ranks."""
    groups = []
    for matrices in (True, False):
        count = sum(n for part in parts for n, is_matrix in part.sizes if is_matrix is matrices)
        groups.append(-(-count // (2 * ranks)) * 2 * ranks)
    return groups
