"""Checks of tensors that users hand in: one-line ValueErrors, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.spec import WindowSpec

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` has the shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")


def check_projections(
    spec: WindowSpec, query: Tensor, others: Mapping[str, tuple[Tensor, int]]
) -> None:
    """Check tensors [B, rows, H, D] that must agree in everything but their rows.

    Args:
        spec: Window per head.
        query: [B, n, H, D].
        others: Name -> (tensor, rows it must have).

    Raises:
        ValueError: If ranks, sizes, dtypes or devices disagree.
    """
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be [B, N, H, D]")
    if 0 in query.shape:
        raise ValueError(f"query has shape {tuple(query.shape)}; no size may be 0")
    if query.dtype not in _DTYPES:
        raise ValueError(f"query is {query.dtype}; use float64, float32, float16 or bfloat16")
    num_batch, _, num_heads, head_dim = query.shape
    if spec.num_heads != num_heads:
        raise ValueError(f"the window spec is for {spec.num_heads} heads, query has {num_heads}")
    for name, (x, rows) in others.items():
        check_shape(name, x, (num_batch, rows, num_heads, head_dim))
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype} and query is {query.dtype}; make them equal")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} and query on {query.device}; move one")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the mask is None, or bool and of the shape."""
    if mask is None:
        return
    check_shape(name, mask, shape)
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}; masks are bool, True = may be attended")


def check_segments(name: str, segments: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the segment ids are None, or integers of the shape."""
    if segments is None:
        return
    check_shape(name, segments, shape)
    if segments.dtype not in _INTEGERS:
        raise ValueError(f"{name} is {segments.dtype}; segment ids are integers")


def check_dropout(
    dropout: AttentionDropout | None, num_batch: int, num_heads: int, num_globals: int
) -> None:
    """Raise ValueError unless the dropout names every example, head and global key."""
    if dropout is None:
        return
    check_shape("dropout.sample_ids", dropout.sample_ids, (num_batch,))
    if dropout.heads is not None and len(dropout.heads) != num_heads:
        raise ValueError(
            f"dropout.heads names {len(dropout.heads)} heads, query has {num_heads}; name each once"
        )
    if num_globals and dropout.global_columns is None:
        raise ValueError("dropout.global_columns is None; give the positions of the global keys")
    if dropout.global_columns is not None:
        check_shape("dropout.global_columns", dropout.global_columns, (num_batch, num_globals))
