"""The windowed rows of a shard, computed while the halo is under way.

::

    rank 1 of 3, n=6, left=1, right=2     local rows     6 | 7 8 9 | 10 11
                                                    border | interior | border
    forward      fetch starts (of all groups), interior rows, halo arrives, border rows
    backward     border rows, halo gradients leave, interior rows, what comes home is added

Interior rows see local keys only. Every rank cuts its rows alike, the first and the last of the
sequence too: their halo is zeros that the band does not see. A shard of left + right rows or
fewer is all border. A rank alone has no neighbour to reach into, so it is all interior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from haloformer.kernels.band import Band, BandKernel
from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.halo import (
    HaloPlan,
    Transfer,
    begin_fetch,
    begin_return,
    end_fetch,
    end_return_,
    plan_halo,
)
from haloformer.kernels.ranks import CommCounter
from haloformer.kernels.shard import SequenceShard
from haloformer.kernels.spec import WindowSpec


class Event(Enum):
    """What happens to one group of heads, forward and backward."""

    HALO_STARTED = "halo started"
    INTERIOR_DONE = "interior done"
    HALO_ARRIVED = "halo arrived"
    BORDER_DONE = "border done"
    BORDER_GRADIENTS_DONE = "border gradients done"
    RETURN_STARTED = "return started"
    INTERIOR_GRADIENTS_DONE = "interior gradients done"
    RETURN_ADDED = "return added"


@dataclass
class EventTrace:
    """What this rank did, in order.

    Attributes:
        events: One entry per event.
    """

    events: list[Event] = field(default_factory=list)

    def record(self, event: Event) -> None:
        """Append an event; a test overrides this to act at that moment."""
        self.events.append(event)


@dataclass(frozen=True)
class Piece:
    """Some local rows and the keys that their windows reach.

    Attributes:
        rows: Local rows.
        keys: Local rows; below 0 and from n on they are rows of the halo.
    """

    rows: range
    keys: range

    def join_keys(self, x: Tensor, halo: Tensor, left: int) -> Tensor:
        """[B, len(keys), ...] of local rows [B, n, ...] and halo [B, left + right, ...]."""
        parts = [x[:, max(self.keys.start, 0) : min(self.keys.stop, x.shape[1])]]
        if self.keys.start < 0:
            parts.insert(0, halo[:, :left])
        if self.keys.stop > x.shape[1]:
            parts.append(halo[:, left:])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add_halo_(self, halo: Tensor, keys: Tensor, left: int, n: int) -> None:
        """Add the halo's rows of [B, len(keys), ...] to ``halo``."""
        if self.keys.start < 0:
            halo[:, :left] += keys[:, :left]
        if self.keys.stop > n:
            halo[:, left:] += keys[:, n - self.keys.start :]

    def add_local_(self, x: Tensor, keys: Tensor) -> None:
        """Add the local rows of [B, len(keys), ...] to ``x`` [B, n, ...]."""
        first, stop = max(self.keys.start, 0), min(self.keys.stop, x.shape[1])
        x[:, first:stop] += keys[:, first - self.keys.start : stop - self.keys.start]


def cut_rows(n: int, left: int, right: int) -> tuple[list[Piece], list[Piece]]:
    """Cut n local rows into interior and border.

    Args:
        n: Local rows.
        left: Rows that windows reach to the left into other ranks.
        right: Rows that they reach to the right.

    Returns:
        At most one interior piece, and up to two of border; together every row once.
    """
    if n <= left + right:
        return [], [Piece(range(n), range(-left, n + right))]
    border = []
    if left:
        border.append(Piece(range(left), range(-left, left + right)))
    if right:
        border.append(Piece(range(n - right, n), range(n - right - left, n + right)))
    return [Piece(range(left, n - right), range(n))], border


@dataclass(frozen=True, eq=False)
class BandJob:
    """What the windowed rows of one group of heads need besides numbers.

    Attributes:
        spec: Windows of the group.
        shard: The sequence and this rank's part of it.
        dropout: Dropout of the group's heads, or None.
        kernel: Who computes.
        counter: Counts what is sent.
        trace: Records what happens when.
        channel: Number of the group: the halos of all groups travel at once.
    """

    spec: WindowSpec
    shard: SequenceShard
    dropout: AttentionDropout | None
    kernel: BandKernel
    counter: CommCounter | None
    trace: EventTrace | None
    channel: int = 0

    def plan(self) -> HaloPlan:
        """The exchange; a rank alone needs no halo."""
        shard = self.shard
        alone = shard.world_size == 1
        left, right = (0, 0) if alone else (self.spec.reach_left, self.spec.reach_right)
        return plan_halo(shard.rank, shard.world_size, shard.num_rows, left, right)

    def band(self, piece: Piece, plan: HaloPlan) -> Band:
        """Who may see whom in a piece."""
        shard, rows, keys = self.shard, piece.rows, piece.keys
        seen = slice(keys.start + plan.left, keys.stop + plan.left)
        attended = shard.with_halo(shard.attention_mask & ~shard.is_global, plan.left, plan.right)
        segments, query_segments, key_segments = shard.segment_ids, None, None
        if segments is not None:
            query_segments = shard.local(segments)[:, rows.start : rows.stop]
            key_segments = shard.with_halo(segments, plan.left, plan.right)[:, seen]
        dropout = self.dropout
        if dropout is not None:
            dropout = replace(dropout, first_row=dropout.first_row + rows.start)
        first = shard.first_row + keys.start  # position of the buffer's first row
        return Band(
            self.spec,
            offset=rows.start - keys.start,
            valid=(max(0, -first), min(len(keys), shard.length - first)),
            key_mask=attended[:, seen],
            query_segments=query_segments,
            key_segments=key_segments,
            global_mask=shard.global_mask,
            global_segments=shard.global_segments,
            dropout=dropout,
        )

    def begin(self, key: Tensor, value: Tensor) -> Transfer:
        """Start fetching the halo of this group's [B, n, h, D]; :func:`overlapped_band` ends it."""
        inputs = (key.detach(), value.detach())
        transfer = begin_fetch(inputs, self.plan(), self.shard.ranks, self.counter, self.channel)
        self.record(Event.HALO_STARTED)
        return transfer

    def record(self, event: Event) -> None:
        """Tell the trace, if there is one."""
        if self.trace is not None:
            self.trace.record(event)


def overlapped_band(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    job: BandJob,
    transfer: Transfer,
) -> Tensor:
    """Windowed rows of heads that share one reach, with a halo just that wide.

    Backward: gradients of halo rows go home and are added to their owner's.

    Args:
        query: [B, n, h, D] this rank's rows.
        key: [B, n, h, D].
        value: [B, n, h, D].
        far_key: [B, G, h, D], global keys, the same on all ranks.
        far_value: [B, G, h, D].
        job: Everything else.
        transfer: What ``job.begin`` started.

    Returns:
        [B, n, h, D].
    """
    out: Tensor = _OverlappedBand.apply(  # type: ignore[no-untyped-call]
        job, transfer, query, key, value, far_key, far_value
    )
    return out


class _OverlappedBand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: BandJob,
        transfer: Transfer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        far_key: Tensor,
        far_value: Tensor,
    ) -> Tensor:
        ctx.job, ctx.plan = job, job.plan()
        plan: HaloPlan = ctx.plan
        interior, border = cut_rows(query.shape[1], plan.left, plan.right)

        def run(piece: Piece, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            rows = query[:, piece.rows.start : piece.rows.stop]
            return job.kernel.forward(rows, keys, values, far_key, far_value, job.band(piece, plan))

        found = [run(piece, key, value) for piece in interior]
        job.record(Event.INTERIOR_DONE)
        halos = end_fetch(transfer, (key, value), plan)
        job.record(Event.HALO_ARRIVED)
        for piece in border:
            keys, values = (
                piece.join_keys(x, halo, plan.left)
                for x, halo in zip((key, value), halos, strict=True)
            )
            found.append(run(piece, keys, values))
        job.record(Event.BORDER_DONE)
        outs, stats = zip(*found, strict=True)
        ctx.save_for_backward(query, key, value, far_key, far_value, *halos, *outs, *stats)
        return _in_order([*interior, *border], outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        job: BandJob = ctx.job
        plan: HaloPlan = ctx.plan
        query, key, value, far_key, far_value, *halos = ctx.saved_tensors
        halos, results = halos[:2], halos[2:]
        n = query.shape[1]
        interior, border = cut_rows(n, plan.left, plan.right)
        num_pieces = len(interior) + len(border)
        outs, stats = results[:num_pieces], results[num_pieces:]

        def run(index: int, piece: Piece, keys: Tensor, values: Tensor) -> Sequence[Tensor]:
            rows = slice(piece.rows.start, piece.rows.stop)
            inputs = (query[:, rows], keys, values, far_key, far_value)
            band = job.band(piece, plan)
            return job.kernel.backward(grad[:, rows], outs[index], stats[index], *inputs, band)

        grad_halos = [torch.zeros_like(x) for x in halos]
        border_grads = []
        for index, piece in enumerate(border, start=len(interior)):
            keys, values = (
                piece.join_keys(x, halo, plan.left)
                for x, halo in zip((key, value), halos, strict=True)
            )
            border_grads.append(run(index, piece, keys, values))
            for halo, part in zip(grad_halos, border_grads[-1][1:3], strict=True):
                piece.add_halo_(halo, part, plan.left, n)
        job.record(Event.BORDER_GRADIENTS_DONE)
        transfer = begin_return(grad_halos, plan, job.shard.ranks, job.counter)
        job.record(Event.RETURN_STARTED)
        grads = [*(run(i, piece, key, value) for i, piece in enumerate(interior)), *border_grads]
        job.record(Event.INTERIOR_GRADIENTS_DONE)
        totals = [torch.zeros_like(x) for x in (key, value)]
        if interior:  # its keys are all the local rows
            totals = list(grads[0][1:3])
        for piece, found in zip(border, border_grads, strict=True):
            for total, part in zip(totals, found[1:3], strict=True):
                piece.add_local_(total, part)
        end_return_(transfer, totals, plan)
        job.record(Event.RETURN_ADDED)
        grad_query = _in_order([*interior, *border], [found[0] for found in grads])
        grad_far = (_sum([found[i] for found in grads]) for i in (3, 4))
        return (None, None, grad_query, *totals, *grad_far)


def _in_order(pieces: Sequence[Piece], parts: Sequence[Tensor]) -> Tensor:
    """Put the pieces' rows back in their order: [B, n, ...]."""
    if len(parts) == 1:
        return parts[0]
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].rows.start)
    return torch.cat([parts[i] for i in order], dim=1)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
