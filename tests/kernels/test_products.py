"""fp32 linears on a CPU: oneDNN against float64 torch, values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from haloformer.kernels import products


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaps(tensors: list[Tensor], dtype: torch.dtype, use: str) -> list[Tensor]:
    """Output and gradients of one linear."""
    x, weight, bias, grad = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    function = products.linear if use == "ours" else functional.linear
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [((1, 1), 1, 1), ((2, 7), 5, 9), ((1, 64), 96, 33), ((3,), 16, 300), ((1, 1, 5), 40, 8)],
)
def test_values_and_gradients_are_those_of_float64(rows, inputs: int, outputs: int) -> None:
    tensors = [
        numbers(*rows, inputs),
        numbers(outputs, inputs, seed=1),
        numbers(outputs, seed=2),
        numbers(*rows, outputs, seed=3),
    ]
    for found, wanted in zip(
        gaps(tensors, torch.float32, "ours"), gaps(tensors, torch.float64, "torch"), strict=True
    ):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_with_gaps_between_them_are_no_slow_path(monkeypatch) -> None:
    # oneDNN computes those by plain loops: every factor it gets has to be dense.
    seen: list[Tensor] = []
    original = products._dense

    def watched(x: Tensor) -> Tensor:
        seen.append(original(x))
        return seen[-1]

    monkeypatch.setattr(products, "_dense", watched)
    wide, weight = numbers(1, 6, 20), numbers(8, 30, seed=1)
    x = wide[..., :10].requires_grad_()
    w = weight[:, 5:15].requires_grad_()
    out = products.linear(x, w, None)
    grad = numbers(1, 6, 16, seed=2)[..., :8]
    found = torch.autograd.grad(out, (x, w), grad)
    assert len(seen) == 6
    assert all(t.is_contiguous() or t.t().is_contiguous() for t in seen)
    wanted = torch.autograd.grad(functional.linear(x, w), (x, w), grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_computed_by_torch(dtype: torch.dtype) -> None:
    x, weight = numbers(2, 3, 8).to(dtype), numbers(4, 8).to(dtype)
    assert torch.equal(products.linear(x, weight, None), functional.linear(x, weight))


def test_no_rows_give_the_graph_of_other_ranks() -> None:
    # ZeRO-2 pairs gradients by the order in which they arrive.
    weight, bias = numbers(4, 8).requires_grad_(), numbers(4).requires_grad_()
    outs = [products.linear(torch.ones(rows, 8), weight, bias) for rows in (0, 3)]
    assert type(outs[0].grad_fn) is type(outs[1].grad_fn)
    outs[0].sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert bias.grad is not None and not bias.grad.any()


def test_only_wanted_gradients_are_computed() -> None:
    x, weight = numbers(2, 3, 8), numbers(4, 8).requires_grad_()
    products.linear(x, weight, None).sum().backward()
    assert x.grad is None and weight.grad is not None
