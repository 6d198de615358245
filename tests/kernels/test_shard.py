"""What a shard says about its part of the sequence."""

import pytest

from cases import LayerCase
from haloformer.kernels.ranks import Ranks

CASE = LayerCase("drawn", 6, (1,), (1,), (1,), ((0, 3), (4,)), ((5,), ()), documents=((2, 4), (6,)))


class FakeGroup:
    """Stands for a process group where nothing is sent."""


def shard(rank):
    return CASE.shard(FakeGroup(), rank, 2)


def test_rows_and_globals_of_each_rank():
    first, second = shard(0), shard(1)
    assert (first.first_row, first.num_rows, second.first_row) == (0, 3, 3)
    marks = [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert first.is_global.int().tolist() == marks
    # The unused slot of example 1 holds position 3, which rank 1 owns: it must not count.
    assert first.owned.tolist() == [[True, False], [False, False]]
    assert second.owned.tolist() == [[False, True], [True, False]]
    assert second.owned_rows.tolist() == [[0, 0], [1, 0]]
    assert first.global_segments.tolist()[0] == [0, 1]


def test_metadata_with_halo_is_false_beyond_the_ends():
    mask = shard(0).attention_mask
    assert shard(0).with_halo(mask, 2, 1)[0].int().tolist() == [0, 0, 1, 1, 1, 1]
    assert shard(1).with_halo(mask, 1, 2)[0].int().tolist() == [1, 1, 1, 0, 0, 0]
    wide = shard(0).with_halo(mask, 9, 9)[1].int().tolist()
    assert wide == [0] * 9 + [1] * 6 + [0] * 6


def test_overwritten_rows_are_globals_and_padding():
    assert shard(1).overwritten.nonzero().tolist() == [[0, 0], [0, 2], [1, 1]]


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [(2, 2, "rank 2 is outside a group of 2 ranks"), (0, 2, "world size 2 needs a process group")],
)
def test_numbers_that_do_not_fit_are_refused(rank, world_size, message):
    with pytest.raises(ValueError, match=message):
        Ranks(None, rank, world_size)
