"""Memory of one rank through a step: what stays, and what each moment adds.

::

    forward             loss      backward              end       reduce     optimizer
    activations grow ........ ......... shrink
    gradients                 ......... grow .......... ......... ........   ........
    temporaries         .     ###       #  #  #         #         ##         ##

The most of all moments is what a device must hold. Every term is a tensor of the engine, of the
model or of DeepSpeed 0.19.8; nothing is a factor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from haloformer.launcher.plan_activations import (
    attention_backward,
    attention_kept,
    embeddings_kept,
    feed_backward,
    feed_kept,
    head_of,
    layer_kept,
)
from haloformer.launcher.plan_model import BUCKET, FP32, Model, Part, Rows, Split, parts_of
from haloformer.launcher.plan_traffic import flat_groups

# Elements that DeepSpeed sums at once at ZeRO-0, and in bf16 at ZeRO-1 (its own constant).
_ALL_AT_ONCE = 500_000_000
_INT64 = 8


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment, in bytes by kind.

    Attributes:
        name: When.
        held: weights, master weights, moments, gradients, buffers, activations, temporaries.
    """

    name: str
    held: Counter[str]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.held.values())


@dataclass(frozen=True)
class MemoryPlan:
    """A rank through one step.

    Attributes:
        moments: In order.
    """

    moments: list[Moment]

    @property
    def peak(self) -> Moment:
        """The one that holds most."""
        return max(self.moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class _State:
    """Sizes that the moments share, in elements; see :func:`memory`."""

    model: Model
    rows: Rows
    split: Split
    accumulation: int
    parts: list[Part]
    groups: list[int]  # flat groups, padded

    @cached_property
    def whole(self) -> int:
        return sum(part.elements for part in self.parts)

    @property
    def padded(self) -> int:
        return sum(self.groups)

    @property
    def partition(self) -> int:
        return self.padded // self.split.zero_ranks

    @property
    def bucket(self) -> int:
        return min(BUCKET, self.whole + self.whole % 2)

    @property
    def tied(self) -> int:
        """Elements of the token embedding."""
        return self.parts[0].sizes[0][0]

    @property
    def bf16_optimizer(self) -> bool:
        """DeepSpeed has one of its own for bf16 at ZeRO-1: whole fp32 gradients, no buckets."""
        return self.split.zero_stage == 1 and self.split.width != FP32


def memory(model: Model, rows: Rows, split: Split, accumulation: int) -> MemoryPlan:
    """One rank's memory through a step.

    Args:
        model: What is trained.
        rows: Of one forward pass.
        split: How the ranks share the work.
        accumulation: Forward passes per step.
    """
    parts = parts_of(model, split.tensor)
    groups = flat_groups(parts, split.zero_ranks)
    state = _State(model, rows, split, accumulation, parts, groups)
    stays = _stays(state)
    moments = [
        *_through_the_pass(state),
        _end_of_backward(state),
        _reduce(state),
        _optimizer(state),
    ]
    return MemoryPlan([Moment(m.name, stays + m.held) for m in moments])


def _stays(state: _State) -> Counter[str]:
    """What is there between steps."""
    split, width = state.split, state.split.width
    inputs = state.rows.batch * 2 * _INT64 * (state.rows.source + state.rows.target)
    if split.zero_stage == 0:
        return Counter(
            weights=width * state.whole, moments=2 * FP32 * state.whole, activations=inputs
        )
    stays = Counter(
        weights=width * state.padded,
        master=FP32 * state.partition,
        moments=2 * FP32 * state.partition,
        activations=inputs,
    )
    if state.bf16_optimizer:
        stays["gradients"] = FP32 * state.padded
    elif split.zero_stage == 3:
        # Its own share, and what the forward pass gathers and the backward keeps.
        stays["weights"] = width * (state.partition + state.whole)
        stays["gradients"] = FP32 * state.partition
        # The bucket of gradients is in the dtype of the sums; what is fetched ahead is gathered
        # into one buffer, from which each weight is then copied.
        stays["buffers"] = (FP32 + width) * state.bucket
    return stays


def _gradients(state: _State, done: int) -> Counter[str]:
    """Gradients of so many elements, on their way through the backward."""
    split = state.split
    if state.bf16_optimizer or split.zero_stage == 3:
        return Counter()
    if split.zero_stage == 0:
        return Counter(gradients=FP32 * (state.whole if state.accumulation > 1 else done))
    if split.zero_stage == 1:
        held = state.whole if state.accumulation > 1 else done
        return Counter(gradients=FP32 * held, buffers=FP32 * state.bucket)
    # ZeRO-2 moves each gradient into the bucket at once, and its own share into a flat buffer.
    owned = FP32 * state.partition if done > state.bucket or state.accumulation > 1 else 0
    return Counter(gradients=owned, buffers=split.width * state.bucket)


def _through_the_pass(state: _State) -> list[Moment]:
    """The loss, and the backward of every layer."""
    model, rows, split = state.model, state.rows, state.split
    head = head_of(model, rows, split)
    below = embeddings_kept(model, rows, split)
    kept = [layer_kept(model, layer, rows, split) for layer in model.layers]
    before = _gradients(state, 0) if state.accumulation > 1 else Counter[str]()
    moments = [
        Moment(
            "loss",
            before + Counter(activations=below + sum(kept) + head.kept, temporaries=head.added),
        )
    ]
    # The tied table has its first gradient from the head, and waits for that of the embedding.
    tied = split.width * state.tied if model.scores_vocabulary else 0
    done = state.parts[-1].elements
    for number in reversed(range(len(model.layers))):
        layer, part = model.layers[number], state.parts[number + 1]
        lower = below + sum(kept[:number])
        attention = sum(attention_kept(model, layer, rows, split).values())
        feed = sum(feed_kept(model, layer, rows, split).values())
        outer = split.width * model.hidden * layer.ffn // split.tensor  # its weight's gradient
        found = _gradients(state, done)
        gradients = found + Counter(gradients=tied)
        moments += [
            Moment(
                f"{part.name}, feed-forward",
                gradients
                + Counter(activations=lower + attention + feed, gradients=outer)
                + Counter(temporaries=feed_backward(model, layer, rows, split)),
            ),
            Moment(
                f"{part.name}, attention",
                gradients
                + Counter(activations=lower + attention, gradients=2 * outer)
                + Counter(temporaries=attention_backward(model, layer, rows, split)),
            ),
        ]
        done += part.elements
    return moments


def _end_of_backward(state: _State) -> Moment:
    """All gradients are there; the tied table has two for a moment."""
    tied = state.split.width * state.tied
    held = _gradients(state, state.whole) + Counter(temporaries=tied)
    if state.split.zero_stage in (2, 3) or state.bf16_optimizer:
        held["temporaries"] += tied
    return Moment("end of backward", held)


def _reduce(state: _State) -> Moment:
    """Gradients are summed over the ranks, a bucket at a time, through a flat copy."""
    split, width = state.split, state.split.width
    held = _gradients(state, state.whole)
    cast = FP32 * state.bucket if width != FP32 else 0
    if state.bf16_optimizer or split.zero_stage == 0:
        held["temporaries"] += FP32 * min(state.whole, _ALL_AT_ONCE)
    elif split.zero_stage == 1:
        # A bucket that is full has taken gradients over; then comes the flat copy.
        held["temporaries"] += FP32 * max(state.partition, state.bucket) - FP32 * state.bucket
    else:
        held["gradients"] += FP32 * state.partition if split.zero_stage == 2 else 0
        held["temporaries"] += width * state.bucket + cast
    return Moment("reduce", held)


def _optimizer(state: _State) -> Moment:
    """Fused AdamW on the flat groups: it has no temporaries of its own."""
    split, ranks = state.split, state.split.zero_ranks
    largest = max(state.groups) // ranks
    held: Counter[str] = Counter()
    if split.zero_stage == 0:
        held["gradients"] = FP32 * state.whole
        return Moment("optimizer", held)
    if state.bf16_optimizer:
        return Moment("optimizer", held)
    if split.zero_stage < 3:
        held["gradients"] = FP32 * state.partition
        if split.width == FP32:
            held["temporaries"] += FP32 * largest  # a flat copy of a group's gradients
    else:
        held["temporaries"] += FP32 * largest
    return Moment("optimizer", held)
