"""Softmax over the ranks' parts, merged, is softmax over all; empty parts do no harm."""

import itertools

import torch

from dist import run_ranks
from haloformer.kernels.merge import merge_over_ranks
from haloformer.kernels.ranks import Ranks

# Three ranks' parts of ten keys.
CUTS = ((0, 4, 4, 10), (0, 10, 10, 10), (0, 0, 3, 10), (0, 1, 2, 10))
# Size of the scores, and the sign that an empty part's infinite log-sum-exp has.
CASES = list(itertools.product(CUTS, (1.0, 1e4), (1.0, -1.0)))


def partial(scores, values, empty_sign=1.0):
    """Output and log-sum-exp over some keys, and lse of either sign where there is none."""
    if scores.shape[-1] == 0:
        rows = scores.shape[0]
        return torch.zeros(rows, values.shape[-1]), torch.full((rows,), empty_sign * torch.inf)
    return torch.softmax(scores, -1) @ values, scores.logsumexp(-1)


def merge_mine(rank, world_size, scores, values):
    ranks = Ranks(torch.distributed.group.WORLD, rank, world_size)
    merged = []
    for cuts, size, sign in CASES:
        mine = slice(cuts[rank], cuts[rank + 1])
        merged.append(merge_over_ranks(*partial(size * scores[:, mine], values[mine], sign), ranks))
    signs = (torch.inf, -torch.inf, torch.inf)
    none = merge_over_ranks(torch.zeros(2, 3), torch.full((2,), signs[rank]), ranks)
    return merged, none


def test_ranks_merge_to_the_whole_also_when_some_have_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 10, generator=generator)
    values = torch.randn(10, 4, generator=generator)
    for merged, none in run_ranks(3, merge_mine, scores, values, timeout=60.0):
        for (_, size, _), found in zip(CASES, merged, strict=True):
            for x, y in zip(found, partial(size * scores, values), strict=True):
                torch.testing.assert_close(x, y)
        assert torch.equal(none[0], torch.zeros(2, 3))
        assert torch.equal(none[1], torch.full((2,), torch.inf))
