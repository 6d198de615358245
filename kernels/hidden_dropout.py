"""Stateless dropout of hidden states: torch on a CPU, one Triton kernel on a GPU.

Plain torch reads and writes memory a dozen times for the hash of every element, which on a GPU
takes longer than the products of a layer; the kernel reads and writes the states once. Neither
keeps a mask for the backward: the gradient is dropped by the same rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haloformer.kernels.dropout import hash_bases, keep_mask
from haloformer.kernels.fused import can_run_here


def hidden_dropout(
    x: Tensor,
    rate: float,
    key: int,
    sample_ids: Tensor,
    first_row: int = 0,
    first_column: int = 0,
) -> Tensor:
    """Drop features of hidden states by (sample, token position, feature).

    Args:
        x: [B, N, E] hidden states of a shard.
        rate: Probability of dropping; kept elements are scaled by 1 / (1 - rate).
        key: Key of the site, from :func:`~haloformer.kernels.dropout.fold_key`.
        sample_ids: [B] int64, the place of each example in the global batch.
        first_row: Position in the whole sequence of row 0.
        first_column: Number of feature 0 where tensor parallelism splits the features.

    Returns:
        [B, N, E] in the dtype of ``x``; ``x`` itself when the rate is 0.
    """
    if rate == 0.0:
        return x
    bases = hash_bases(key, sample_ids, (0,))
    if by_triton(x):
        dropped: Tensor = drop_by_triton(x, bases, rate, first_row, first_column)
        return dropped
    rows = torch.arange(first_row, first_row + x.shape[1], device=x.device)
    columns = torch.arange(first_column, first_column + x.shape[2], device=x.device)
    keep = keep_mask(bases[:, :, None], rows[None, :, None], columns[None, None, :], rate)
    return torch.where(keep, x * (1.0 / (1.0 - rate)), 0.0)


def by_triton(x: Tensor) -> bool:
    """Whether the kernel computes ``x``; it works in float32, which would not do for float64."""
    return x.is_cuda and x.dtype != torch.float64 and can_run_here(x.device.type) is None


@torch.library.custom_op("haloformer::hidden_dropout", mutates_args=())
def drop_by_triton(
    x: Tensor, bases: Tensor, rate: float, first_row: int, first_column: int
) -> Tensor:
    """The same elements by the Triton kernel; its own backward.

    Args:
        x: [B, N, E].
        bases: [B, 1] int32 of :func:`~haloformer.kernels.dropout.hash_bases`.
        rate: Probability of dropping.
        first_row: Position in the whole sequence of row 0.
        first_column: Number of feature 0.
    """
    from haloformer.kernels.triton_dropout import launch_dropout

    return launch_dropout(x, bases, rate, first_row, first_column)


@drop_by_triton.register_fake
def _(x: Tensor, bases: Tensor, rate: float, first_row: int, first_column: int) -> Tensor:
    return x.new_empty(x.shape)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bases, *ctx.numbers = inputs
    ctx.save_for_backward(bases)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (bases,) = ctx.saved_tensors
    return drop_by_triton(grad, bases, *ctx.numbers), None, None, None, None


drop_by_triton.register_autograd(_backward, setup_context=_keep_arguments)
