"""The halo travels while interior rows are computed, forward and backward."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from cases import LayerCase, gradients
from dist import run_ranks
from haloformer.kernels.overlap import Event, EventTrace, cut_rows
from haloformer.kernels.sharded import sharded_attention

FORWARD = [Event.HALO_STARTED, Event.INTERIOR_DONE, Event.HALO_ARRIVED, Event.BORDER_DONE]
BACKWARD = [
    Event.BORDER_GRADIENTS_DONE,
    Event.RETURN_STARTED,
    Event.INTERIOR_GRADIENTS_DONE,
    Event.RETURN_ADDED,
]
TWO_REACHES = LayerCase("two reaches", 32, (2, 2, 2), (2, 2, 2), (1, 3, 1))
ALL_BORDER = LayerCase("all border", 8, (3,), (3,), (1,))


@dataclass
class Baton(EventTrace):
    """Tells the other rank, at one event, that it may begin."""

    at: Event | None = None

    def record(self, event):
        super().record(event)
        if event is self.at:
            dist.send(torch.zeros(1), dst=1, tag=9)


def attend(case, rank, trace):
    shard = case.shard(dist.group.WORLD, rank, 2)
    here = slice(shard.first_row, shard.first_row + shard.num_rows)
    *inputs, grad = case.tensors()
    inputs = [x if i == 3 else x[:, here].clone() for i, x in enumerate(inputs)]
    inputs = [x.requires_grad_() for x in inputs]
    return sharded_attention(*inputs, case.spec, shard, trace=trace), grad[:, here]


def traces(rank, world_size):
    found = []
    for case in (TWO_REACHES, ALL_BORDER):
        trace = EventTrace()
        out, grad = attend(case, rank, trace)
        out.backward(grad)
        found.append(trace.events)
    return found


def interior_first(rank, world_size):
    """Rank 1 begins each way only when rank 0 has finished its interior rows."""
    case = LayerCase("one reach", 32, (2,), (2,), (1,))
    trace = Baton(at=Event.INTERIOR_DONE) if rank == 0 else EventTrace()
    if rank == 1:
        dist.recv(torch.zeros(1), src=0, tag=9)
    out, grad = attend(case, rank, trace)
    if rank == 0:
        trace.at = Event.INTERIOR_GRADIENTS_DONE
    else:
        dist.recv(torch.zeros(1), src=0, tag=9)
    out.backward(grad)
    return trace.events


def test_halo_starts_before_the_interior_and_border_gradients_leave_before_it():
    for two_reaches, all_border in run_ranks(2, traces, timeout=60.0):
        # Both halos leave; then narrow heads and the dilated head; backward the other way round.
        assert two_reaches == FORWARD[:1] * 2 + FORWARD[1:] * 2 + BACKWARD * 2
        assert all_border == FORWARD + BACKWARD


def test_a_rank_finishes_its_interior_before_its_neighbour_has_sent_a_row():
    """Hangs, and fails by its time limit, if the interior waits for the halo."""
    for events in run_ranks(2, interior_first, timeout=60.0):
        assert events == FORWARD + BACKWARD


@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 3), (2, 3), (9, 1), (30, 30)])
@pytest.mark.parametrize("n", [1, 5, 6, 16])
def test_every_row_is_in_one_piece_with_all_its_keys(n, left, right):
    interior, border = cut_rows(n, left, right)
    rows = [i for piece in [*interior, *border] for i in piece.rows]
    assert sorted(rows) == list(range(n))
    assert len(interior) == (n > left + right)
    for piece in [*interior, *border]:
        assert piece.keys.start <= piece.rows.start - left
        assert piece.keys.stop >= piece.rows.stop + right
    assert all(piece.keys == range(n) for piece in interior)


@pytest.mark.parametrize("backend", ["chunks", "loop"])
def test_the_two_halves_of_a_backend_give_the_loops_gradients(backend):
    case = LayerCase("alone", 12, (2, 2), (2, 2), (1, 3), ((3,),), dropout=0.3)
    *inputs, grad = case.tensors()
    inputs = [x.requires_grad_() for x in inputs]
    out = sharded_attention(*inputs, case.spec, case.shard(), dropout=case.sites(), backend=backend)
    for x, y in zip([out, *gradients(out, inputs, grad)], case.truth(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
