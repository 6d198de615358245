"""The Triton kernel of :mod:`haloformer.kernels.hidden_dropout`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from haloformer.kernels.dropout import drop_threshold
from haloformer.kernels.operands import device_guard, interpreted, launch_options
from haloformer.kernels.tiles import Tile
from haloformer.kernels.triton_parts import hash_rows, kept

DROPOUT_TILE = Tile(1, 1024, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_column", "threshold"])
def dropout_kernel(
    X,
    BASES,
    OUT,
    num_rows,
    num_features,
    first_row,
    first_column,
    threshold,
    keep_scale,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (i, j): features j * BLOCK and up of row i of all samples' rows, which are dense."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < num_features
    at = row * num_features + column
    x = tl.load(X + at, mask=real, other=0.0)
    if UPCAST:  # the interpreter's bf16 arithmetic is garbage
        x = x.to(tl.float32)
    row_hash = hash_rows(BASES, row // num_rows, first_row + row % num_rows)
    stays = kept(row_hash, column + first_column, threshold)
    scaled = tl.where(stays, x.to(tl.float32) * keep_scale, 0.0)
    tl.store(OUT + at, scaled.to(OUT.dtype.element_ty), mask=real)


def dropout_arguments(
    x: Tensor, bases: Tensor, out: Tensor, rate: float, first_row: int, first_column: int
) -> dict[str, Any]:
    """Arguments of the kernel for dense [B, N, E] and [B, 1]."""
    return {
        "X": x,
        "BASES": bases,
        "OUT": out,
        "num_rows": x.shape[1],
        "num_features": x.shape[2],
        "first_row": first_row,
        "first_column": first_column,
        "threshold": drop_threshold(rate),
        "keep_scale": 1.0 / (1.0 - rate),
        "BLOCK": DROPOUT_TILE.block_columns,
        "UPCAST": interpreted() and x.dtype == torch.bfloat16,
    }


def launch_dropout(
    x: Tensor, bases: Tensor, rate: float, first_row: int, first_column: int
) -> Tensor:
    """Run the kernel: [B, N, E] and bases [B, 1] -> [B, N, E] in the dtype of ``x``."""
    x, bases = x.contiguous(), bases.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        grid = (x.shape[0] * x.shape[1], triton.cdiv(x.shape[2], DROPOUT_TILE.block_columns))
        with device_guard(x.device):
            arguments = dropout_arguments(x, bases, out, rate, first_row, first_column)
            dropout_kernel[grid](**arguments, **launch_options(DROPOUT_TILE))
    return out
