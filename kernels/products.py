"""fp32 linears on a CPU by oneDNN, which torch itself asks for other dtypes only.

torch sends fp32 products to MKL, and MKL takes its AVX2 path on processors that are not Intel's.
oneDNN asks the processor: with AVX-512 it is twice as fast on one (measured: 180 to 240 against 98
to 110 GFLOP/s per core). Both accumulate in fp32. Everything else (GPUs, other dtypes, float64
references, autocast, torch.compile) goes to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, differentiable.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.

    Returns:
        [..., O] in the dtype of ``x``.
    """
    if not _by_onednn(x, weight):
        return functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return out


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and not torch.compiler.is_compiling()  # the compiler chooses products itself
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class _Linear(torch.autograd.Function):
    # Gradients arrive in this order, bias before weight, as those of torch's own linear: ZeRO
    # wants one order whichever way a layer takes.

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad_out.flatten(0, -2)
        wants_x, wants_bias, wants_weight = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = _product(grad, weight.t(), None).view(x.shape)
        if wants_weight:
            grad_weight = _product(grad.t(), x.flatten(0, -2).t(), None)
        if wants_bias and ctx.has_bias:
            grad_bias = grad.sum(0)
        return grad_x, grad_bias, grad_weight


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b.T + bias`` of [M, K] and [N, K]."""
    if a.numel() == 0 or b.numel() == 0:
        # In here and not beside the Function: ranks without rows need the graph of the others.
        empty = a.new_zeros(a.shape[0], b.shape[0])
        return empty if bias is None else empty + bias
    # The operator that torch's own compiler calls. It has no derivative, hence the Function.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")
    return out


def _dense(x: Tensor) -> Tensor:
    """``x`` without gaps between its rows: with them oneDNN takes plain loops, 1000x slower."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
