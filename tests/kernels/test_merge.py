"""Softmax over parts, merged, is softmax over all; empty parts do no harm."""

import itertools

import pytest
import torch

from dist import run_ranks
from haloformer.kernels.merge import merge_over_ranks, merge_partials
from haloformer.kernels.ranks import Ranks


def partial(scores, values, empty_sign=1.0):
    """Output and log-sum-exp over some keys, and lse of either sign where there is none."""
    if scores.shape[-1] == 0:
        rows = scores.shape[0]
        return torch.zeros(rows, values.shape[-1]), torch.full((rows,), empty_sign * torch.inf)
    return torch.softmax(scores, -1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("cuts", [(0, 3, 10), (0, 10, 10), (0, 0, 4, 10), (0, 1, 2, 3, 10)])
@pytest.mark.parametrize("empty_sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_merged_parts_equal_the_whole(cuts, empty_sign, size):
    generator = torch.Generator().manual_seed(0)
    scores = size * torch.randn(6, 10, generator=generator)
    values = torch.randn(10, 4, generator=generator)
    parts = [partial(scores[:, a:b], values[a:b], empty_sign) for a, b in itertools.pairwise(cuts)]
    out, lse = merge_partials(*zip(*parts, strict=True))
    whole_out, whole_lse = partial(scores, values)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)])
def test_nothing_merged_with_nothing_is_zero(signs):
    lses = [torch.full((3,), sign * torch.inf) for sign in signs]
    out, lse = merge_partials([torch.zeros(3, 2)] * 2, lses)
    assert torch.equal(out, torch.zeros(3, 2)) and torch.equal(lse, torch.full((3,), torch.inf))


def test_the_parts_keep_their_dtype_and_the_statistics_float32():
    out, lse = merge_partials([torch.ones(3, 2).bfloat16()] * 2, [torch.zeros(3)] * 2)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def merge_mine(rank, world_size, scores, values):
    cuts = [0, 4, 4, 10]
    a, b = cuts[rank], cuts[rank + 1]
    ranks = Ranks(torch.distributed.group.WORLD, rank, world_size)
    some = merge_over_ranks(*partial(scores[:, a:b], values[a:b]), ranks)
    none = merge_over_ranks(torch.zeros(2, 3), torch.full((2,), torch.inf), ranks)
    return some, none


def test_ranks_merge_to_the_whole_also_when_one_has_nothing():
    scores, values = 50 * torch.randn(6, 10), torch.randn(10, 4)
    whole = partial(scores, values)
    for some, none in run_ranks(3, merge_mine, scores, values, timeout=60.0):
        for x, y in zip(some, whole, strict=True):
            torch.testing.assert_close(x, y)
        assert torch.equal(none[0], torch.zeros(2, 3)) and none[1].isinf().all()
