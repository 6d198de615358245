"""The Triton kernels as one differentiable operator, ``haloformer::window_attention``.

torch.compile and activation checkpointing see a single opaque op with a shape rule and a backward
op. Triton is imported when the op first runs, so this module loads where Triton is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from haloformer.kernels.band import Band, BandKernel
from haloformer.kernels.operands import BandOperands, interpreted

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 128
_MAX_TILE_ROWS = 128
_MAX_GRID = 65535


def can_run_triton(query: Tensor, key: Tensor, band: Band) -> str | None:
    """Why the Triton kernels cannot take these operands, or None if they can.

    Args:
        query: [B, n, H, D].
        key: [B, m, H, D].
        band: Who may see whom.
    """
    batch, _, num_heads, head_dim = query.shape
    reason: str | None = can_run_here(query.device.type)
    if reason is not None:
        return reason
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is not float32, float16 or bfloat16"
    if head_dim > _MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {_MAX_HEAD_DIM}"
    if batch * num_heads > _MAX_GRID:
        return f"batch * heads = {batch * num_heads} is above {_MAX_GRID}"
    # Offsets inside a tile are 32-bit; everything else is addressed in 64 bits.
    row = max(query.stride(1), key.stride(1), num_heads * head_dim)
    if row * max(band.spec.dilation) * _MAX_TILE_ROWS >= 1 << 31:
        return f"dilation {max(band.spec.dilation)} spreads a tile over 2**31 elements"
    return None


# Looks at the installation, which torch.compile could not trace and need not trace.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_run_here(device_type: str) -> str | None:
    """Why no Triton kernel can run on tensors of a device type, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type != "cuda" and not interpreted():
        return f"the tensors are on {device_type}, and Triton needs a CUDA or ROCm device"
    return None


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    band: Band,
) -> tuple[Tensor, Tensor]:
    """The low-level op of :mod:`haloformer.kernels.band` on the Triton kernels, differentiable.

    Args:
        query: [B, n, H, D], float32, float16 or bfloat16, like all the others.
        key: [B, m, H, D].
        value: [B, m, H, D].
        global_key: [B, G, H, D] or None.
        global_value: [B, G, H, D] or None.
        band: Who may see whom.

    Returns:
        Output [B, n, H, D] and log-sum-exp [B, n, H] fp32, +inf on rows without a key; no gradient
        flows through the latter.

    Raises:
        ValueError: If :func:`can_run_triton` gives a reason.
    """
    reason = can_run_triton(query, key, band)
    if reason is not None:
        raise ValueError(f"backend triton cannot run: {reason}; choose backend chunks or auto")
    out, lse = _forward(*_arguments(query, key, value, global_key, global_value, band))
    return out, lse.detach()


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    band: Band,
) -> tuple[Any, ...]:
    """The op's flat arguments."""
    has_globals = global_key is not None and global_key.shape[1] > 0
    dropout = band.dropout if band.dropout is not None and band.dropout.rate > 0.0 else None
    return (
        query,
        key,
        value,
        global_key if has_globals else None,
        global_value if has_globals else None,
        band.key_mask,
        band.query_segments,
        band.key_segments,
        band.global_mask if has_globals else None,
        band.global_segments if has_globals else None,
        None if dropout is None else dropout.bases(query.shape[2]),
        dropout.global_columns if dropout is not None and has_globals else None,
        band.spec.left,
        band.spec.right,
        band.spec.dilation,
        [band.offset, *band.valid],
        0.0 if dropout is None else dropout.rate,
        0 if dropout is None else dropout.first_row,
    )


@torch.library.custom_op("haloformer::window_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    global_mask: Tensor | None,
    global_segments: Tensor | None,
    bases: Tensor | None,
    global_columns: Tensor | None,
    left: Sequence[int],
    right: Sequence[int],
    dilation: Sequence[int],
    placement: Sequence[int],
    rate: float,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    from haloformer.kernels.triton_fwd import launch_forward

    tensors = (
        query, key, value, global_key, global_value, key_mask, query_segments, key_segments,
        global_mask, global_segments, bases, global_columns,
    )  # fmt: skip
    return launch_forward(_operands(tensors, (left, right, dilation), placement, rate, first_row))


@_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("haloformer::window_attention_backward", mutates_args=())
def _backward(
    out: Tensor,
    lse: Tensor,
    out_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    global_mask: Tensor | None,
    global_segments: Tensor | None,
    bases: Tensor | None,
    global_columns: Tensor | None,
    left: Sequence[int],
    right: Sequence[int],
    dilation: Sequence[int],
    placement: Sequence[int],
    rate: float,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from haloformer.kernels.triton_bwd import launch_backward

    tensors = (
        query, key, value, global_key, global_value, key_mask, query_segments, key_segments,
        global_mask, global_segments, bases, global_columns,
    )  # fmt: skip
    operands = _operands(tensors, (left, right, dilation), placement, rate, first_row)
    dq, dk, dv, dgk, dgv = launch_backward(operands, out, lse, out_grad)
    # An op cannot return None: the absent gradients of absent global keys are empty.
    return (
        dq,
        dk,
        dv,
        query.new_empty(0) if dgk is None else dgk,
        (query.new_empty(0) if dgv is None else dgv),
    )


@_backward.register_fake
def _(
    out: Tensor,
    lse: Tensor,
    out_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    sources = (query, key, value, global_key, global_value)
    return tuple(query.new_empty(0 if x is None else x.shape) for x in sources)


def _operands(
    tensors: tuple[Tensor | None, ...],
    windows: tuple[Sequence[int], Sequence[int], Sequence[int]],
    placement: Sequence[int],
    rate: float,
    first_row: int,
) -> BandOperands:
    """Rebuild the operands behind the op's flat signature."""
    query, key, value, global_key, global_value, key_mask, *rest = tensors
    assert query is not None and key is not None and value is not None
    query_segments, key_segments, global_mask, global_segments, bases, global_columns = rest
    left, right, dilation = windows
    offset, low, high = placement
    return BandOperands(
        query=query,
        key=key,
        value=value,
        windows=(tuple(left), tuple(right), tuple(dilation)),
        offset=offset,
        low=low,
        high=high,
        key_mask=key_mask,
        query_segments=query_segments,
        key_segments=key_segments,
        global_key=global_key,
        global_value=global_value,
        global_mask=global_mask,
        global_segments=global_segments,
        bases=bases,
        global_columns=global_columns,
        rate=rate,
        first_row=first_row,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.rest = inputs[12:]


def _gradients(ctx: Any, out_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    dq, dk, dv, dgk, dgv = _backward(out, lse, out_grad, *tensors, *ctx.rest)
    no_globals = tensors[3] is None
    none = (None,) * (len(tensors) - 5 + len(ctx.rest))
    return (dq, dk, dv, None if no_globals else dgk, None if no_globals else dgv, *none)


_forward.register_autograd(_gradients, setup_context=_save)


def _forward_piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    band: Band,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _forward(
        *_arguments(query, key, value, global_key, global_value, band)
    )
    return found


def _backward_piece(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    band: Band,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = _arguments(query, key, value, global_key, global_value, band)
    dq, dk, dv, dgk, dgv = _backward(out, lse, grad_out, *arguments)
    # Without global keys the op's gradients of them are flat.
    return dq, dk, dv, dgk.view(global_key.shape), dgv.view(global_value.shape)


KERNEL = BandKernel(_forward_piece, _backward_piece)
