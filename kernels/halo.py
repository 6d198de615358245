"""Halo exchange: each rank fetches the neighbouring rows that its windows reach into.

::

    N=6, world size 2, left=right=1      rank 0: 0 1 2           rank 1: 3 4 5
    fetched (the halo)                   rank 0: . 3             rank 1: 2 .
    on the way home, added               row 3's halo gradient goes to rank 1, row 2's to rank 0

Rows travel straight from their owner, in one message per peer for all tensors together. A reach
wider than a shard fetches from several ranks to either side. Rows beyond the ends of the sequence
are zeros. Both ways are one plan, read from either end, and both are begun and ended by the
caller, who computes in between (``overlap``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from haloformer.kernels.ranks import CommCounter, Direction, Ranks


@dataclass(frozen=True)
class Parcel:
    """Rows that travel between this rank and one other in the forward exchange.

    Attributes:
        peer: The other rank, within the group.
        rows: Outgoing: rows of the local tensor. Incoming: rows of the halo.
        direction: Which way it travels forward; gradients travel the other way.
    """

    peer: int
    rows: slice
    direction: Direction


@dataclass(frozen=True)
class HaloPlan:
    """Who sends which rows to whom.

    Attributes:
        left: Halo rows to the left, the first of the halo.
        right: Halo rows to the right, behind them.
        outgoing: What this rank sends forward, and gets gradients for.
        incoming: What it receives forward, and sends gradients for.
    """

    left: int
    right: int
    outgoing: tuple[Parcel, ...]
    incoming: tuple[Parcel, ...]


def plan_halo(rank: int, world_size: int, num_rows: int, left: int, right: int) -> HaloPlan:
    """Plan the exchange of one rank.

    Args:
        rank: This rank.
        world_size: Ranks along the sequence.
        num_rows: Rows per rank.
        left: Rows that a rank's windows reach to the left of its first row.
        right: Rows that they reach to the right of its last row.
    """
    outgoing, incoming = [], []
    for hop in range(1, world_size):
        # The rank `hop` places to my left gives its last rows: of my left halo, those not yet
        # given by nearer ranks.
        count = min(num_rows, left - (hop - 1) * num_rows)
        if count > 0:
            if rank - hop >= 0:
                stop = left - (hop - 1) * num_rows
                incoming.append(Parcel(rank - hop, slice(stop - count, stop), Direction.RIGHT))
            if rank + hop < world_size:
                rows = slice(num_rows - count, num_rows)
                outgoing.append(Parcel(rank + hop, rows, Direction.RIGHT))
        count = min(num_rows, right - (hop - 1) * num_rows)
        if count > 0:
            if rank + hop < world_size:
                start = left + (hop - 1) * num_rows
                incoming.append(Parcel(rank + hop, slice(start, start + count), Direction.LEFT))
            if rank - hop >= 0:
                outgoing.append(Parcel(rank - hop, slice(0, count), Direction.LEFT))
    return HaloPlan(left, right, tuple(outgoing), tuple(incoming))


@dataclass(frozen=True)
class Transfer:
    """Messages under way. Begin it, compute, then ``wait``.

    Attributes:
        requests: What to wait for.
        received: Flat messages, one per parcel received.
        sent: Flat messages; the requests read them until they are done.
    """

    requests: list[dist.Work]
    received: list[Tensor]
    sent: list[Tensor]

    def wait(self) -> list[Tensor]:
        """Wait for everything, and return what was received."""
        for request in self.requests:
            request.wait()
        return self.received


def begin_transfer(
    xs: Sequence[Tensor],
    sends: Sequence[Parcel],
    receives: Sequence[Parcel],
    ranks: Ranks,
    homeward: bool,
    counter: CommCounter | None,
    channel: int = 0,
) -> Transfer:
    """Start sending rows of ``xs`` and receiving others of the same shapes.

    Args:
        xs: Tensors [B, rows, ...] of one dtype; each parcel carries its rows of all of them.
        sends: Rows of ``xs`` to send.
        receives: Parcels to receive.
        ranks: The group.
        homeward: Gradients on their way home, against the direction of the parcels.
        counter: Counts what is sent.
        channel: Tells transfers apart that are under way at the same time.
    """
    sent = [torch.cat([x[:, p.rows].reshape(-1) for x in xs]) for p in sends]
    row_size = sum(x[:, :1].numel() for x in xs)
    received = [xs[0].new_empty(row_size * (p.rows.stop - p.rows.start)) for p in receives]
    operations = []
    for op, parcels, messages in ((dist.isend, sends, sent), (dist.irecv, receives, received)):
        for parcel, message in zip(parcels, messages, strict=True):
            tag = parcel.direction.value + 2 * homeward + 4 * channel
            operations.append(
                dist.P2POp(op, message, group=ranks.group, tag=tag, group_peer=parcel.peer)
            )
    for parcel, message in zip(sends, sent, strict=True):
        _count(parcel, message, homeward, counter)
    requests = dist.batch_isend_irecv(operations) if operations else []
    return Transfer(requests, received, sent)


def _count(parcel: Parcel, message: Tensor, homeward: bool, counter: CommCounter | None) -> None:
    if counter is None:
        return
    back = Direction.LEFT if parcel.direction is Direction.RIGHT else Direction.RIGHT
    rows = counter.halo_gradient_rows if homeward else counter.halo_rows
    rows[back if homeward else parcel.direction] += parcel.rows.stop - parcel.rows.start
    counter.halo_bytes += message.numel() * message.element_size()


def unpack(message: Tensor, parcel: Parcel, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a message into the parcel's rows of each tensor."""
    shapes = [(x.shape[0], parcel.rows.stop - parcel.rows.start, *x.shape[2:]) for x in like]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(s) for part, s in zip(torch.split(message, sizes), shapes, strict=True)]


def begin_fetch(
    xs: Sequence[Tensor],
    plan: HaloPlan,
    ranks: Ranks,
    counter: CommCounter | None,
    channel: int = 0,
) -> Transfer:
    """Start fetching the halo of tensors [B, n, ...] of one dtype."""
    return begin_transfer(xs, plan.outgoing, plan.incoming, ranks, False, counter, channel)


def end_fetch(transfer: Transfer, xs: Sequence[Tensor], plan: HaloPlan) -> tuple[Tensor, ...]:
    """Wait for the halo of each tensor: [B, left + right, ...], zeros beyond the sequence."""
    halos = tuple(x.new_zeros(x.shape[0], plan.left + plan.right, *x.shape[2:]) for x in xs)
    for message, parcel in zip(transfer.wait(), plan.incoming, strict=True):
        for halo, part in zip(halos, unpack(message, parcel, xs), strict=True):
            halo[:, parcel.rows] = part
    return halos


def begin_return(
    grad_halos: Sequence[Tensor], plan: HaloPlan, ranks: Ranks, counter: CommCounter | None
) -> Transfer:
    """Start sending gradients [B, left + right, ...] of halos home."""
    return begin_transfer(grad_halos, plan.incoming, plan.outgoing, ranks, True, counter)


def end_return_(transfer: Transfer, grads: Sequence[Tensor], plan: HaloPlan) -> None:
    """Add what came home to the gradients [B, n, ...] of the local rows."""
    for message, parcel in zip(transfer.wait(), plan.outgoing, strict=True):
        for grad, part in zip(grads, unpack(message, parcel, grads), strict=True):
            grad[:, parcel.rows] += part
