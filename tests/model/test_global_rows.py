"""A layer's global rows are the same whether its projections fold, and folding is what it does."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from haloformer.kernels.sharded import global_attention
from haloformer.model.global_rows import GlobalKey, GlobalValue, answer_global_rows
from haloformer.model.rows import whole_sequence

LENGTH, HEADS, SIZE = 40, 4, 32


def answer(num_globals, kinds):
    """Rows, gradients of everything, and FLOPs of the forward pass."""
    torch.manual_seed(0)
    key, value = (kind(SIZE, SIZE, dtype=torch.float64) for kind in kinds)
    query = torch.randn(2, num_globals, HEADS, SIZE // HEADS, dtype=torch.float64)
    hidden = torch.randn(2, LENGTH, SIZE, dtype=torch.float64, requires_grad=True)
    marks = torch.zeros(2, LENGTH, dtype=torch.int64)
    marks[:, :num_globals] = 1
    shard = whole_sequence(torch.zeros(2, LENGTH, dtype=torch.int64), None, marks)
    attention = global_attention(shard, None, range(HEADS))
    with FlopCounterMode(display=False) as counter:
        rows = answer_global_rows(query.requires_grad_(), hidden, key, value, attention)
    inputs = [query, hidden, *key.parameters(), *value.parameters()]
    grads = torch.autograd.grad((rows * rows.detach().cos()).sum(), inputs)
    return [rows.detach(), *grads], counter.get_total_flops()


@pytest.mark.parametrize(("num_globals", "folds"), [(1, True), (7, True), (8, False), (9, False)])
def test_projections_fold_below_the_crossing_and_nothing_changes(num_globals, folds):
    ours, flops = answer(num_globals, (GlobalKey, GlobalValue))
    plain, projected = answer(num_globals, (nn.Linear, nn.Linear))
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert flops < projected if folds else flops == projected
