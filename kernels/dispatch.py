"""The public attention op on one device, and the choice of who computes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from torch import Tensor

from haloformer.kernels import chunks, fused, reference
from haloformer.kernels.band import Band, BandKernel
from haloformer.kernels.checks import (
    check_dropout,
    check_mask,
    check_projections,
    check_segments,
)
from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.spec import WindowSpec

WindowAttention = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Band], tuple[Tensor, Tensor]
]

BACKENDS = ("auto", "chunks", "triton", "loop")

_log = logging.getLogger(__name__)


def can_run_chunks(query: Tensor, key: Tensor, band: Band) -> str | None:
    """Why blocked torch cannot take these operands, or None: it takes all."""
    return None


def can_run_loop(query: Tensor, key: Tensor, band: Band) -> str | None:
    """Why the reference cannot take these operands, or None if it can."""
    limit = 4096
    if query.shape[1] > limit:
        return f"the reference loops over every row: {query.shape[1]} rows are above {limit}"
    return None


def can_run_triton(query: Tensor, key: Tensor, band: Band) -> str | None:
    """Why the Triton kernels cannot take these operands, or None if they can."""
    return fused.can_run_triton(query, key, band)


def choose_backend(backend: str, query: Tensor, key: Tensor, band: Band) -> WindowAttention:
    """The function that will compute a band. Looks at shapes, dtypes and devices only.

    Args:
        backend: "auto" (Triton on a GPU where it can run, else chunks), or one by name.
        query: [B, n, H, D].
        key: [B, m, H, D].
        band: Who may see whom.

    Returns:
        A function with the signature of :mod:`haloformer.kernels.band`.

    Raises:
        ValueError: If the name is unknown or that backend cannot run here; says why.
    """
    return {
        "chunks": chunks.window_attention,
        "triton": fused.window_attention,
        "loop": reference.window_attention,
    }[_choose(backend, query, key, band)]


def choose_kernel(backend: str, query: Tensor, key: Tensor, band: Band) -> BandKernel:
    """:func:`choose_backend`, as two halves without autograd."""
    return {"chunks": chunks.KERNEL, "triton": fused.KERNEL, "loop": reference.KERNEL}[
        _choose(backend, query, key, band)
    ]


def _choose(backend: str, query: Tensor, key: Tensor, band: Band) -> str:
    checks = {"chunks": can_run_chunks, "triton": can_run_triton, "loop": can_run_loop}
    if backend == "auto":
        reason = None if query.is_cuda else f"the tensors are on {query.device.type}"
        reason = reason if reason is not None else can_run_triton(query, key, band)
        chosen = "triton" if reason is None else "chunks"
        _log_choice(chosen, reason)
        return chosen
    if backend not in checks:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    reason = checks[backend](query, key, band)
    if reason is not None:
        raise ValueError(f"attention backend {backend!r} cannot run: {reason}")
    return backend


@cache  # once per choice and reason, however many layers and steps ask
def _log_choice(chosen: str, reason: str | None) -> None:
    why = "" if reason is None else f" (not triton: {reason})"
    _log.info("attention backend: %s%s", chosen, why)


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: WindowSpec,
    *,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_key_mask: Tensor | None = None,
    global_segment_ids: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sliding-window attention of a whole sequence on one device.

    Each row attends the keys of its window and all global keys, in one softmax. Rows without any
    key give zeros. Differentiable in all five tensors::

        N=5, left=right=1, one global key g       g   0 1 2 3 4
                                          row 0   1   1 1 . . .
                                          row 1   1   1 1 1 . .
                                          row 2   1   . 1 1 1 .
                                          row 3   1   . . 1 1 1
                                          row 4   1   . . . 1 1

    Args:
        query: [B, N, H, D], float64, float32, float16 or bfloat16.
        key: [B, N, H, D].
        value: [B, N, H, D].
        spec: One-sided, inclusive window and dilation of each head.
        key_mask: [B, N] bool, True = may be attended in the band. It masks keys, not rows. Mask
            out padding, and the rows that are also given as global keys.
        segment_ids: [B, N] integers; rows see only keys of their own segment.
        global_key: [B, G, H, D], joins the softmax of every row.
        global_value: [B, G, H, D].
        global_key_mask: [B, G] bool, True = a real global key.
        global_segment_ids: [B, G] integers; without them all segments see all global keys.
        dropout: Dropout of the softmax.
        backend: "auto", "chunks", "triton" or "loop".

    Returns:
        [B, N, H, D] in the dtype of the query.

    Raises:
        ValueError: If shapes or dtypes disagree, or the backend cannot run.
    """
    _check_tensors(spec, query, key, value, global_key, global_value)
    num_globals = 0 if global_key is None else global_key.shape[1]
    rows, slots = tuple(query.shape[:2]), (query.shape[0], num_globals)
    check_mask("key_mask", key_mask, rows)
    check_segments("segment_ids", segment_ids, rows)
    check_mask("global_key_mask", global_key_mask, slots)
    check_segments("global_segment_ids", global_segment_ids, slots)
    if global_segment_ids is not None and segment_ids is None:
        raise ValueError("global_segment_ids is given without segment_ids; give both or neither")
    check_dropout(dropout, query.shape[0], query.shape[2], num_globals)
    band = Band(
        spec,
        offset=0,
        valid=(0, query.shape[1]),
        key_mask=key_mask,
        query_segments=segment_ids,
        key_segments=segment_ids,
        global_mask=global_key_mask,
        global_segments=global_segment_ids,
        dropout=None if dropout is None else replace(dropout, first_row=0),
    )
    attend = choose_backend(backend, query, key, band)
    return attend(query, key, value, global_key, global_value, band)[0]


def _check_tensors(
    spec: WindowSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
) -> None:
    if (global_key is None) != (global_value is None):
        raise ValueError("only one of global_key and global_value is given; give both or neither")
    length = query.shape[1] if query.dim() == 4 else 0
    others = {"key": (key, length), "value": (value, length)}
    if global_key is not None and global_value is not None:
        num_globals = global_key.shape[1] if global_key.dim() == 4 else 0
        others["global_key"] = (global_key, num_globals)
        others["global_value"] = (global_value, num_globals)
    check_projections(spec, query, others)
