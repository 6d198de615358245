"""The halo plan moves each row from its owner, and the backward is its exact mirror."""

import itertools

import pytest
import torch
import torch.distributed as dist

from dist import run_ranks
from haloformer.kernels.halo import begin_fetch, begin_return, end_fetch, end_return_, plan_halo
from haloformer.kernels.ranks import CommCounter, Direction, Ranks

SIZES = [
    (world_size, n, left, right)
    for world_size in (1, 2, 3, 4)
    for n in (1, 3, 5)
    for left, right in ((0, 0), (1, 0), (0, 2), (3, 3), (4, 7), (12, 30))
]


@pytest.mark.parametrize(("world_size", "n", "left", "right"), SIZES)
def test_every_halo_row_comes_from_its_owner_once(world_size, n, left, right):
    plans = [plan_halo(rank, world_size, n, left, right) for rank in range(world_size)]
    for rank, plan in enumerate(plans):
        buffer = [None] * (left + right)
        for parcel in plan.incoming:
            # The matching parcel at the other end: same direction, pointing at me.
            (sent,) = [
                x
                for x in plans[parcel.peer].outgoing
                if x.peer == rank and x.direction is parcel.direction
            ]
            assert buffer[parcel.rows] == [None] * (parcel.rows.stop - parcel.rows.start)
            buffer[parcel.rows] = [parcel.peer * n + i for i in range(n)[sent.rows]]
        before = range(rank * n - left, rank * n)
        positions = [*before, *range((rank + 1) * n, (rank + 1) * n + right)]
        assert buffer == [i if 0 <= i < world_size * n else None for i in positions]
    outgoing = sum(len(plan.outgoing) for plan in plans)
    assert outgoing == sum(len(plan.incoming) for plan in plans)


def exchange(rank, world_size):
    """Exchange known rows; send back known gradients; a pair of half-precision tensors too."""
    ranks = Ranks(dist.group.WORLD, rank, world_size)
    n, left, right = 3, 4, 1
    whole = torch.arange(float(world_size * n * 2)).view(1, -1, 2)
    x = whole[:, rank * n : (rank + 1) * n]
    y = (x + 100).unsqueeze(-1)
    counter = CommCounter()
    plan = plan_halo(rank, world_size, n, left, right)
    halos = end_fetch(begin_fetch((x, y), plan, ranks, counter), (x, y), plan)
    # Each halo row weighs what its holder's number is, so each owner must get the sum.
    grads = [torch.full_like(x, 100.0), torch.full_like(y, 100.0)]
    weights = [torch.full_like(halo, rank + 1) for halo in halos]
    end_return_(begin_return(weights, plan, ranks, counter), grads, plan)
    half = [x.to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    low = [end_fetch(begin_fetch((z,), plan, ranks, None), (z,), plan)[0].float() for z in half]
    return halos, grads, counter, low


@pytest.fixture(scope="module")
def answers():
    return run_ranks(3, exchange, timeout=60.0)


def test_rows_arrive_and_gradients_come_home_and_add_up(answers):
    world_size, n, left, right = 3, 3, 4, 1
    whole = torch.arange(float(world_size * n * 2)).view(1, -1, 2)
    padded = torch.nn.functional.pad(whole, (0, 0, left, right))
    exists = torch.nn.functional.pad(torch.ones(1, n * world_size, 2), (0, 0, left, right))
    expected_grad = torch.full((world_size * n,), 100.0)
    for rank, (halos, _, _, low) in enumerate(answers):
        before = range(rank * n - left, rank * n)
        positions = [*before, *range((rank + 1) * n, (rank + 1) * n + right)]
        places = [position + left for position in positions]
        assert torch.equal(halos[0], padded[:, places])
        assert torch.equal(halos[1][..., 0], padded[:, places] + 100 * exists[:, places])
        assert all(torch.equal(x, padded[:, places]) for x in low)
        for position in positions:
            if 0 <= position < world_size * n:
                expected_grad[position] += rank + 1
    for i in range(2):
        grad = torch.cat([grads[i] for _, grads, _, _ in answers], dim=1).flatten(2)
        assert torch.equal(grad, expected_grad[None, :, None].expand(1, -1, 2))


def test_bytes_are_counted_at_the_send(answers):
    counters = [answer[2] for answer in answers]
    # To the right: 4 rows wanted, 3 per rank; rank 0 serves both others, rank 2 nobody.
    assert [c.halo_rows[Direction.RIGHT] for c in counters] == [4, 3, 0]
    assert [c.halo_rows[Direction.LEFT] for c in counters] == [0, 1, 1]
    assert [c.halo_gradient_rows[Direction.LEFT] for c in counters] == [0, 3, 4]
    assert [c.halo_gradient_rows[Direction.RIGHT] for c in counters] == [1, 1, 0]
    # A row is two tensors of two float32.
    assert [c.halo_bytes for c in counters] == [16 * 5, 16 * 8, 16 * 5]


def test_rows_sent_do_not_depend_on_length_or_ranks():
    reach = 5
    for world_size, n in itertools.product((3, 4), (5, 64, 4096)):
        plan = plan_halo(1, world_size, n, reach, reach)
        sent = [parcel.rows.stop - parcel.rows.start for parcel in plan.outgoing]
        assert sent == [reach, reach]


def test_one_rank_alone_gets_zeros_and_returns_nothing():
    x, plan = torch.randn(2, 3, 4), plan_halo(0, 1, 3, 2, 1)
    (halo,) = end_fetch(begin_fetch((x,), plan, Ranks(), None), (x,), plan)
    assert torch.equal(halo, torch.zeros(2, 3, 4))
    grad = x.clone()
    end_return_(begin_return((torch.ones_like(halo),), plan, Ranks(), None), (grad,), plan)
    assert torch.equal(grad, x)
