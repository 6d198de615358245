"""Global rows are gathered, answered together and put back, whoever owns them."""

import torch

from cases import LayerCase
from dist import run_ranks
from haloformer.kernels.global_tokens import gather_global_rows, gather_rows_of, scatter_rows
from haloformer.kernels.ranks import CommCounter

# Example 0: both globals on rank 1, in falling order. Example 1: none. Token 2 of it is padding.
CASE = LayerCase("pair", 6, (1,), (1,), (1,), ((5, 3), ()), ((), (2,)))
NO_GLOBALS = LayerCase("none", 6, (1,), (1,), (1,))


def gather_and_scatter(rank, world_size):
    shard = CASE.shard(torch.distributed.group.WORLD, rank, world_size)
    here = slice(3 * rank, 3 * rank + 3)
    x = (torch.arange(12.0).view(2, 6, 1, 1) + 1)[:, here].clone().requires_grad_()
    counter = CommCounter()
    rows = gather_global_rows(x, shard, counter)
    # Each rank weighs the gathered rows differently; the owner must get the sum.
    (grad,) = torch.autograd.grad((rows * (rank + 1)).sum(), x)
    pair = gather_rows_of([x.detach().bfloat16(), x.detach()[..., 0].bfloat16()], shard)

    band = torch.full((2, 3, 1, 1), 7.0, requires_grad=True)
    far = torch.tensor([[50.0, 30.0], [-1.0, -1.0]]).view(2, 2, 1, 1).requires_grad_()
    out = scatter_rows(band, far, shard)
    grads = torch.autograd.grad((out * x.detach()).sum(), [band, far])

    empty = gather_global_rows(x[:1], NO_GLOBALS.shard(torch.distributed.group.WORLD, rank, 2))
    return rows.detach(), grad, pair, out.detach(), grads, counter.reduced_bytes, empty.shape


def test_gathered_and_scattered_on_two_ranks():
    answers = run_ranks(2, gather_and_scatter, timeout=60.0)
    for rows, _, pair, *_ in answers:
        assert rows.flatten(1).tolist() == [[6.0, 4.0], [0.0, 0.0]]
        assert pair[0].dtype == torch.bfloat16 and pair[1].shape == (2, 2, 1)
        assert torch.equal(pair[0].float(), rows) and torch.equal(pair[1].float(), rows[..., 0])
    assert [grad.flatten(1).tolist() for _, grad, *_ in answers] == [
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[3.0, 0.0, 3.0], [0.0, 0.0, 0.0]],
    ]
    assert [out.flatten(1).tolist() for _, _, _, out, *_ in answers] == [
        [[7.0, 7.0, 7.0], [7.0, 7.0, 0.0]],
        [[30.0, 7.0, 50.0], [7.0, 7.0, 7.0]],
    ]
    band_grads = [answer[4][0].flatten(1).tolist() for answer in answers]
    assert band_grads == [
        [[1.0, 2.0, 3.0], [7.0, 8.0, 0.0]],
        [[0.0, 5.0, 0.0], [10.0, 11.0, 12.0]],
    ]
    far_grads = [answer[4][1].flatten(1).tolist() for answer in answers]
    assert far_grads == [[[0.0, 0.0], [0.0, 0.0]], [[6.0, 4.0], [0.0, 0.0]]]
    # Four rows of one float32, forward and back.
    assert [answer[5] for answer in answers] == [32, 32]
    assert [tuple(answer[6]) for answer in answers] == [(1, 0, 1, 1)] * 2
