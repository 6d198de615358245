"""Folded global projections give what projecting the sequence gives, on every number of ranks.

The truth is the projected path on one rank in float64, which test_sharded.py holds to the loops.
"""

import pytest
import torch

from cases import LAYER_CASES, gradients
from dist import run_ranks
from haloformer.kernels.fold import attend_folded, fold_query, folding_pays, unfold_answer
from haloformer.kernels.global_tokens import attend_globally
from haloformer.kernels.sharded import global_attention

CASES = [case for case in LAYER_CASES if max(len(x) for x in case.globals_) > 0]
NAMES = ("out", "query", "hidden", "key weight", "key bias", "value weight", "value bias")
FEATURES = 24
# Folding sums over E features where projecting sums over D: fp32 rounds a little more.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}


def draw(case):
    """Query, hidden states, two weights with biases, and a gradient of the output, in float64."""
    generator = torch.Generator().manual_seed(len(case.name))
    heads, dim = case.spec.num_heads, case.tensors()[0].shape[3]
    shard = case.shard()

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows = (len(case.globals_), shard.num_globals, heads, dim)
    width = heads * dim
    inputs = [normal(*rows), normal(rows[0], case.length, FEATURES)]
    inputs += [normal(width, FEATURES), normal(width), normal(width, FEATURES), normal(width)]
    return inputs, normal(*rows)


def truth(case):
    inputs, grad = draw(case)
    query, hidden, *weights = inputs = [x.requires_grad_() for x in inputs]
    key, value = (
        torch.nn.functional.linear(hidden, weight, bias).unflatten(2, query.shape[2:])
        for weight, bias in (weights[:2], weights[2:])
    )
    attention = global_attention(case.shard(), case.sites(), range(case.spec.num_heads))
    out = attend_globally(query, key, value, attention)
    return [out.detach(), *gradients(out, inputs, grad)]


def folded(rank, world_size, group, dtype):
    found = {}
    for case in CASES:
        if world_size not in case.world_sizes:
            continue
        shard = case.shard(group, rank, world_size)
        here = slice(shard.first_row, shard.first_row + shard.num_rows)
        inputs, grad = draw(case)
        inputs[1] = inputs[1][:, here]
        inputs = [x.to(dtype).clone().requires_grad_() for x in inputs]
        query, hidden, *weights = inputs
        attention = global_attention(shard, case.sites(), range(case.spec.num_heads))
        answer = attend_folded(fold_query(query, *weights[:2]), hidden, attention)
        out = unfold_answer(answer, *weights[2:])
        # A rank uses the rows it owns; the others' are there as well, and get no gradient.
        owned = grad * shard.owned[:, :, None, None]
        found[case.name] = [out.detach(), *gradients(out, inputs, owned.to(dtype))]
    return found


def work(rank, world_size):
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN: unwritten elements show
    group = torch.distributed.group.WORLD
    return {dtype: folded(rank, world_size, group, dtype) for dtype in TOLERANCE}


@pytest.fixture(scope="module")
def answers():
    return {size: run_ranks(size, work, timeout=120.0) for size in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folding_equals_projecting(case, answers):
    assert any(size in case.world_sizes for size in answers)
    used = case.shard().global_mask[:, :, None, None]
    for size, dtype in ((s, d) for s in answers for d in TOLERANCE if s in case.world_sizes):
        parts = [answer[dtype][case.name] for answer in answers[size]]
        for index, (name, want) in enumerate(zip(NAMES, truth(case), strict=True)):
            same = [part[index].double() for part in parts]
            if name == "out":
                assert all(torch.equal(x, same[0]) for x in same)
                assert not (same[0] * ~used).any()
                got = same[0]
            elif name == "hidden":
                got = torch.cat(same, dim=1)
            else:
                got = sum(same)  # a share per rank, like that of any weight
            error = (got - want).abs().max() / want.abs().max().clamp(min=1.0)
            assert error <= TOLERANCE[dtype], f"{name} on {size} ranks in {dtype} is off by {error}"


def test_folding_pays_below_the_crossing():
    assert folding_pays(63, 12, 768)
    assert not folding_pays(64, 12, 768)
