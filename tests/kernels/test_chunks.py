"""Blocked torch against the loops, forward and every gradient, case by case."""

from dataclasses import replace

import pytest
import torch

from cases import BAND_CASES, BandCase, random_band_case, truth_of_band
from haloformer.kernels import chunks
from haloformer.kernels.dropout import AttentionDropout

NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_global_key", "d_global_value")


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, so an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def worst_error(found, truth):
    """Largest error relative to the largest true value (at least 1); empty rows must match."""
    worst = 0.0
    for name, x, y in zip(NAMES, found, truth, strict=False):
        assert torch.equal(x.isinf(), y.isinf()), f"{name}: other rows are empty"
        x, y = x.double().nan_to_num(posinf=0.0, nan=torch.inf), y.nan_to_num(posinf=0.0)
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp(min=1.0)))
    return worst


@pytest.mark.parametrize("case", BAND_CASES, ids=str)
def test_equals_the_loops(case, poisoned):
    truth = truth_of_band(case)
    assert worst_error(case.run(chunks.window_attention), truth) < 1e-10
    rounded = truth_of_band(case, torch.float32)
    assert worst_error(case.run(chunks.window_attention, torch.float32), rounded) < 1e-5


def check_random(seeds, monkeypatch):
    for seed in seeds:
        case = random_band_case(seed)
        # Small blocks too, so that few rows make many blocks.
        monkeypatch.setattr(chunks, "BLOCK_ROWS", (3, 8, 64)[seed % 3])
        error = worst_error(case.run(chunks.window_attention), truth_of_band(case))
        assert error < 1e-10, f"{case}: {error}"


def test_random_bands_equal_the_loops(poisoned, monkeypatch):
    check_random(range(100), monkeypatch)


@pytest.mark.extended
def test_many_random_bands_equal_the_loops(poisoned, monkeypatch):
    check_random(range(1000, 2000), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_good_as_its_rounding(dtype):
    case = BandCase("half", 70, (9, 4), (9, 0), (1, 2), num_globals=3, masked=0.2, dropout=0.2)
    found = case.run(chunks.window_attention, dtype)
    assert [x.dtype for x in found[2:]] == [dtype] * 5
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    # Computed in float32: what is left is the rounding of results, and of `out` inside delta.
    assert worst_error(found, truth_of_band(case, dtype)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_logits_of_ten_thousand_give_no_nan(dtype):
    case = BandCase("huge", 70, (9,), (9,), (1,), head_dim=16, num_globals=2)
    *inputs, grad_out = case.tensors(dtype)
    # |logit| = 16 * 50 * 50 / 4 = 1e4, both signs in every row.
    for x in (inputs[0], inputs[1], inputs[3]):
        x.sign_().mul_(50.0)
        x.requires_grad_()
    out, lse = chunks.window_attention(*inputs, case.band())
    assert lse.max() > 1e3
    grads = torch.autograd.grad(out, [inputs[0], inputs[1], inputs[3]], grad_out)
    for x in (out, lse, *grads):
        assert x.isfinite().all()


def test_rows_without_a_key_are_zero_and_give_no_gradient():
    case = BandCase("empty", 30, (2, 2), (2, 2), (1, 2), num_globals=2)
    band = case.band()
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[:, 8:20] = False
    band = replace(band, key_mask=mask, global_mask=torch.zeros(1, 2, dtype=torch.bool))
    *inputs, grad_out = case.tensors()
    for x in inputs:
        x.requires_grad_()
    out, lse = chunks.window_attention(*inputs, band)
    assert not lse.requires_grad
    assert (out[:, 12:16] == 0).all() and (lse[:, 12:16] == torch.inf).all()
    grads = torch.autograd.grad(out, inputs, grad_out)
    assert (grads[0][:, 12:16] == 0).all()
    for grad in grads[1:3]:
        assert (grad[:, 8:20] == 0).all() and (grad[:, :8] != 0).any()
    for grad in grads[3:]:
        assert (grad == 0).all()


def test_inputs_may_be_strided_views():
    case = BandCase("views", 40, (5, 3), (5, 3), (1, 2), num_batch=2)
    truth = case.run(chunks.window_attention)
    *inputs, grad_out = case.tensors()
    packed = torch.stack([x.transpose(1, 2) for x in inputs[:3]], dim=-1).requires_grad_()
    query, key, value = (packed[..., i].transpose(1, 2) for i in range(3))
    out, _ = chunks.window_attention(query, key, value, None, None, case.band())
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    torch.testing.assert_close(out, truth[0], rtol=0, atol=1e-12)
    for i in range(3):
        torch.testing.assert_close(grad[..., i].transpose(1, 2), truth[2 + i], rtol=0, atol=1e-12)


def test_dropout_of_some_heads_is_that_of_the_whole_layer():
    case = BandCase("heads", 40, (5, 5, 5), (5, 5, 5), (1, 1, 1), dropout=0.4)
    query, key, value, *_ = case.tensors()
    band = case.band()
    whole, _ = chunks.window_attention(query, key, value, None, None, band)
    some = [2, 0]
    dropout = AttentionDropout(
        band.dropout.rate,
        band.dropout.key,
        band.dropout.sample_ids,
        band.dropout.first_row,
        heads=(2, 0),
    )
    part, _ = chunks.window_attention(
        query[:, :, some],
        key[:, :, some],
        value[:, :, some],
        None,
        None,
        replace(band, spec=band.spec.select(some), dropout=dropout),
    )
    torch.testing.assert_close(part, whole[:, :, some], rtol=0, atol=1e-12)


def test_backward_keeps_no_scores():
    """What autograd holds grows with the rows, not with rows times window."""
    held = []

    def pack(x):
        held.append(x.numel())
        return x

    case = BandCase("memory", 256, (60,), (60,), (1,), head_dim=2)
    *inputs, _ = case.tensors(torch.float32)
    for x in inputs[:3]:
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        chunks.window_attention(*inputs, case.band())
    assert sum(held) <= 5 * 256 * 2
