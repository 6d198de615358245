"""A layer's global rows are the same whether its projections fold, and folding is what it does."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from haloformer.kernels.sharded import global_attention
from haloformer.kernels.spec import WindowSpec
from haloformer.model.attention import LongformerSelfAttention
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


def orders(num_globals):
    """Names of a layer's modules as they are called, of its parameters as gradients arrive."""
    torch.manual_seed(0)
    spec = WindowSpec.from_two_sided(4, HEADS)
    layer = LongformerSelfAttention(SIZE, spec, 1, dropout=0.0, std=0.1, tensor_group=None)
    called, arrived = [], []
    for name, module in layer.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    for name, weight in layer.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    marks = torch.zeros(1, LENGTH, dtype=torch.int64)
    marks[:, :num_globals] = 1
    shard = whole_sequence(torch.zeros(1, LENGTH, dtype=torch.int64), None, marks)
    layer(torch.randn(1, LENGTH, SIZE, requires_grad=True), shard, None).sum().backward()
    return called, arrived


def test_zero_sees_one_order_of_modules_and_gradients_folded_or_not():
    """Data-parallel ranks may hold other numbers of globals, and ZeRO follows the order."""
    called, arrived = orders(1)
    assert len(called) == 7 and len(arrived) == 14
    assert orders(9) == (called, arrived)
