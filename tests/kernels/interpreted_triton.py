"""The Triton kernels in Triton's interpreter: run by test_triton_interpreted.py in its own process.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process either interprets or
compiles. The interpreter proves index logic, not rounding: its tf32 is fp32, and bf16 is upcast.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import (
    BAND_CASES,
    BandCase,
    LayerCase,
    gradients,
    random_band_case,
    truth_of_band,
)
from dist import run_ranks
from haloformer.kernels import fused, reference
from haloformer.kernels.band import Band
from haloformer.kernels.dropout import AttentionDropout, hash_bases, keep_mask
from haloformer.kernels.hidden_dropout import drop_by_triton, hidden_dropout
from haloformer.kernels.operands import interpreted
from haloformer.kernels.sharded import sharded_attention
from haloformer.kernels.spec import WindowSpec

assert interpreted(), "run test_triton_interpreted.py, which sets TRITON_INTERPRET"

NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_global_key", "d_global_value")
MORE_CASES = (
    BandCase("head dim 128", 20, (5,), (5,), (1,), head_dim=128, num_globals=2),
    BandCase("head dim 96, wide, causal", 50, (40,), (0,), (1,), head_dim=96),
    BandCase("interior tiles", 130, (70, 30), (70, 45), (1, 2), head_dim=16, masked=0.1),
    BandCase("interior tiles, dropout", 97, (60,), (60,), (1,), 16, dropout=0.3, segments=True),
    BandCase("33 globals and one row", 1, (1,), (1,), (1,), 16, num_globals=33, dropout=0.2),
    BandCase("globals summed in two parts", 530, (1,), (1,), (1,), 16, num_globals=2),
    BandCase(
        "wide heads, everything",
        40,
        (9, 4),
        (9, 0),
        (1, 2),
        head_dim=72,
        halo=(5, 4),
        missing=(2, 0),
        num_globals=3,
        masked=0.2,
        segments=True,
        global_segments=True,
        dropout=0.25,
    ),
    BandCase("fewer rows than the dilation", 3, (2,), (2,), (7,), halo=(15, 15)),
)
SMALL = BandCase(
    "small, everything", 30, (9, 4), (9, 0), (1, 2), halo=(5, 4), missing=(2, 0),
    num_globals=3, masked=0.2, segments=True, global_segments=True, dropout=0.25,
)  # fmt: skip
SHARDED = LayerCase(
    "interior and borders", 32, (3, 2), (3, 2), (1, 2), ((17,), (30, 4)), ((), (31,)),
    dropout=0.25, head_dim=16,
)  # fmt: skip
HALF_CASES = (
    SMALL,
    BandCase("half", 70, (9, 40), (9, 0), (1, 2), head_dim=64, num_globals=3),
    BandCase("half, head dim 80", 20, (7,), (7,), (1,), head_dim=80, dropout=0.3),
)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, so an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def relative_errors(found, truth):
    """Largest error of each result relative to its largest true value (at least 1)."""
    errors = {}
    for name, x, y in zip(NAMES, found, truth, strict=False):
        assert torch.equal(x.isinf(), y.isinf()), f"{name}: other rows are empty"
        x, y = x.double().nan_to_num(posinf=0.0, nan=torch.inf), y.nan_to_num(posinf=0.0)
        scale = y.abs().max().clamp(min=1.0) if y.numel() else 1.0
        errors[name] = float((x - y).abs().max() / scale) if y.numel() else 0.0
    return errors


def check_against_loops(case, dtype):
    """Error at most 2x (gradients 3x) that of the loops in the same dtype, and a few roundings."""
    truth = truth_of_band(case, dtype)
    errors = relative_errors(case.run(fused.window_attention, dtype), truth)
    plain = relative_errors(case.run(reference.window_attention, dtype), truth)
    eps = torch.finfo(dtype).eps
    for name, error in errors.items():
        if name.startswith("d_"):
            # Gradients cancel: dP - dO.O is exactly 0 where a row sees one key. The loops find that
            # 0; a fused kernel, which has O only as rounded, finds what the rounding left.
            bound = 3 * plain[name] + (32 if dtype == torch.float32 else 4) * eps
        else:
            bound = 2 * plain[name] + (8 if dtype == torch.float32 else 1) * eps
        assert error <= bound, f"{case} {dtype} {name}: {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("case", BAND_CASES + MORE_CASES, ids=str)
def test_equals_the_loops(case):
    check_against_loops(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_is_as_good_as_the_loops_in_it(case, dtype):
    check_against_loops(case, dtype)


def sharded_by_the_kernel(rank, world_size):
    shard = SHARDED.shard(torch.distributed.group.WORLD, rank, world_size)
    here = slice(shard.first_row, shard.first_row + shard.num_rows)
    *inputs, grad_out = (x.float() for x in SHARDED.tensors())
    inputs = [x if i == 3 else x[:, here] for i, x in enumerate(inputs)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    sites = SHARDED.sites()
    out = sharded_attention(*inputs, SHARDED.spec, shard, dropout=sites, backend="triton")
    return [out.detach(), *gradients(out, inputs, grad_out[:, here])]


def test_interior_and_borders_of_two_ranks_equal_the_loops():
    parts = zip(*run_ranks(2, sharded_by_the_kernel, timeout=120.0), strict=True)
    for index, (part, want) in enumerate(zip(parts, SHARDED.truth(), strict=True)):
        # Every rank's gradient of the global queries (4) is a share, like that of a weight.
        found = sum(part) if index == 4 else torch.cat(part, dim=1)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(300))
def test_random_bands_equal_the_loops(seed):
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    check_against_loops(random_band_case(seed), dtype)


def test_dropout_drops_the_same_elements_as_in_torch():
    """With one-hot values the output shows the mask itself, and so do the gradients of values."""
    n, num_globals, heads = 28, 4, 2
    ids, far = torch.tensor([3, 2**40 + 1]), torch.tensor([[9, 2, 70000, 5], [1, 1, 8, 3]])
    dropout = AttentionDropout(0.4, 0xDEADBEEF, ids, 2**31 - 20, far, heads=(5, 2))
    band = Band(WindowSpec((n,) * heads, (n,) * heads, (1, 2)), 0, (0, n), dropout=dropout)
    one_hot = torch.eye(num_globals + n)[None, :, None, :].repeat(2, 1, heads, 1)
    value = one_hot[:, num_globals:].contiguous().requires_grad_()
    global_value = one_hot[:, :num_globals].contiguous().requires_grad_()
    query = torch.zeros(2, n, heads, num_globals + n)
    out, _ = fused.window_attention(query, query, value, query[:, :num_globals], global_value, band)
    columns = torch.cat([far, (2**31 - 20 + torch.arange(n)).expand(2, n)], 1)
    rows = 2**31 - 20 + torch.arange(n)
    kept = keep_mask(
        dropout.bases(heads)[:, None, :, None], rows[:, None, None], columns[:, None, None, :], 0.4
    )
    distance = torch.arange(n) - torch.arange(n)[:, None]
    seen = torch.stack([torch.ones(n, n, dtype=torch.bool), distance % 2 == 0], 1)
    seen = torch.cat([torch.ones(n, heads, num_globals, dtype=torch.bool), seen], 2)
    assert torch.equal(out != 0, kept & seen)
    grad_out = torch.eye(num_globals + n)[None, :n, None, :].repeat(2, 1, heads, 1)
    grads = torch.autograd.grad(out, (global_value, value), grad_out)
    dropped = torch.cat(grads, 1)[..., :n].transpose(1, 3)
    assert torch.equal(dropped != 0, kept & seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_logits_of_ten_thousand_give_no_nan(dtype):
    case = BandCase("huge", 40, (9,), (9,), (1,), head_dim=16, num_globals=2)
    *inputs, grad_out = case.tensors(dtype)
    # |logit| = 16 * 50 * 50 / 4 = 1e4, both signs in every row.
    for x in (inputs[0], inputs[1], inputs[3]):
        x.sign_().mul_(50.0)
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = fused.window_attention(*inputs, case.band())
    assert lse.max() > 1e3
    for x in (out, lse, *torch.autograd.grad(out, inputs, grad_out)):
        assert x.isfinite().all()


def test_inputs_may_be_strided_views():
    case = BandCase("views", 40, (5, 3), (5, 3), (1, 2), num_batch=2)
    truth = [x.float() for x in truth_of_band(case, torch.float32)]
    *inputs, grad_out = case.tensors(torch.float32)
    for dim in (3, -1):  # features next to each other, and not
        packed = torch.stack([x.transpose(1, 2) for x in inputs[:3]], dim=dim).requires_grad_()
        views = [x.transpose(1, 2) for x in packed.unbind(dim)]
        out, _ = fused.window_attention(*views, None, None, case.band())
        (grad,) = torch.autograd.grad(out, packed, grad_out)
        grads = [x.transpose(1, 2) for x in grad.unbind(dim)]
        for x, y in zip((out, *grads), (truth[0], *truth[2:]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("apart", ["rows", "heads"])
def test_more_than_two_to_the_31_elements_are_addressed(apart):
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = 1 << (23 if apart == "rows" else 30)
    n, num_heads = (270, 1) if apart == "rows" else (30, 3)
    huge = torch.empty(270 << 23, dtype=torch.float16)  # reserved, hardly touched
    torch.utils.deterministic.fill_uninitialized_memory = True
    row, head = (far, 16) if apart == "rows" else (48, far)
    views = [
        huge.as_strided((1, n, num_heads, 16), (n * row, row, head, 1), 16 * i) for i in range(3)
    ]
    assert (
        sum((size - 1) * step for size, step in zip(views[0].shape, views[0].stride(), strict=True))
        > 2**31
    )
    for seed, x in enumerate(views):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    band = Band(WindowSpec((2,) * num_heads, (2,) * num_heads, (1,) * num_heads), 0, (0, n))

    def run(inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, lse = fused.window_attention(*inputs, None, None, band)
        return out, lse, *torch.autograd.grad(out.square().sum(), inputs)

    for x, y in zip(run(views), run([x.contiguous() for x in views]), strict=True):
        assert torch.equal(x, y)


def test_nothing_to_attend_or_no_rows():
    spec = WindowSpec((2,), (2,), (1,))
    query = torch.randn(1, 5, 1, 16, requires_grad=True)
    nothing = torch.zeros(1, 0, 1, 16, requires_grad=True)
    out, lse = fused.window_attention(query, nothing, nothing, None, None, Band(spec, 0, (0, 0)))
    assert (out == 0).all() and (lse == torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert (grad == 0).all()
    out, lse = fused.window_attention(nothing, query, query, query, query, Band(spec, 2, (0, 5)))
    assert out.shape == nothing.shape and lse.shape == (1, 0, 1)
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert (grad == 0).all()


def test_gradients_are_the_same_bits_every_time_compiled_and_recomputed():
    *inputs, grad_out = SMALL.tensors(torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    band = SMALL.band()

    def attend(*x):
        return fused.window_attention(*x, band)[0]

    def recomputed(*x):
        return checkpoint(attend, *x, use_reentrant=False)

    first = None
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for function in (attend, attend, recomputed, compiled):
        out = function(*inputs)
        results = (out, *torch.autograd.grad(out, inputs, grad_out))
        first = results if first is None else first
        for x, y in zip(results, first, strict=True):
            assert torch.equal(x, y), function


def test_the_operator_keeps_the_rules_of_torch():
    inputs = [torch.randn(1, 6, 2, 16, requires_grad=True) for _ in range(5)]
    rest = (*[None] * 7, (2, 1), (2, 0), (1, 2), (0, 0, 6), 0.0, 0)
    torch.library.opcheck(torch.ops.haloformer.window_attention.default, (*inputs, *rest))


def test_no_gradient_flows_through_the_log_sum_exp():
    query = torch.randn(1, 5, 1, 16, requires_grad=True)
    spec = WindowSpec((2,), (2,), (1,))
    assert not fused.window_attention(query, query, query, None, None, Band(spec, 0, (0, 5)))[
        1
    ].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 3, 1030), (3, 1, 1), (2, 0, 8)], ids=str)
def test_hidden_dropout_is_that_of_torch(shape, dtype):
    ids = torch.tensor([3, 2**40 + 1, 7])[: shape[0]]
    place = {"first_row": 2**31 - 4, "first_column": 96}
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    strided = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    found = drop_by_triton(strided, hash_bases(0xDEADBEEF, ids, (0,)), 0.4, *place.values())
    wanted = hidden_dropout(x.requires_grad_(), 0.4, 0xDEADBEEF, ids, **place)
    grads = [torch.autograd.grad(*pair, grad)[0] for pair in ((found, strided), (wanted, x))]
    for ours, theirs in ((found, wanted), grads):
        assert ours.dtype == dtype and torch.equal(ours == 0, theirs == 0)
        # The interpreter rounds bf16 towards zero.
        slack = 2**-7 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=0.0)


def test_hidden_dropout_keeps_the_rules_of_torch():
    inputs = (torch.randn(2, 3, 8, requires_grad=True), torch.zeros(2, 1, dtype=torch.int32))
    torch.library.opcheck(torch.ops.haloformer.hidden_dropout.default, (*inputs, 0.3, 5, 0))
