"""Backward of the fused window attention: gradient of the query, and the launch of all of it.

Probabilities are recomputed from the saved LSE. No kernel uses atomics: each output element has one
owner that adds in a fixed order, so gradients are the same bits on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from haloformer.kernels.operands import (
    RUNTIME_INTEGERS,
    BandOperands,
    current_architecture,
    launch_options,
    shared_arguments,
)
from haloformer.kernels.tiles import Tile, dot_precision, tiles_for
from haloformer.kernels.triton_bwd_keys import (
    global_grad_kernel,
    key_grad_kernel,
)
from haloformer.kernels.triton_parts import (
    GLOBAL_BLOCK,
    LOG2E,
    band_tiles,
    class_bounds,
    class_size,
    dot_rows,
    global_visible,
    hash_rows,
    kept,
    key_visible,
    load_ids,
    load_tile,
    load_window,
    part_range,
    probability_grads,
    row_block,
    store_tile,
)

# The gradient of the global keys is summed in at most this many partial sums per example and head.
MAX_GLOBAL_PARTS = 64
MIN_ROWS_PER_PART = 512


@triton.jit
def query_grad_step(
    dq,
    scores,
    do,
    k,
    v,
    lse2,
    delta,
    row_hash,
    columns,
    threshold,
    keep_scale,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LEAN: tl.constexpr,
):
    """Add what one tile of masked base-2 scores [BM, BN] gives to the query's gradient."""
    dp = dot_rows(do, v, D, BD, PRECISION, UPCAST, LEAN)
    keep = dp
    if HAS_DROPOUT:
        keep = kept(row_hash[:, None], columns[None, :], threshold)
    _, ds = probability_grads(
        scores, lse2[:, None], dp, delta[:, None], keep, keep_scale, HAS_DROPOUT
    )
    return tl.dot(ds.to(k[0].dtype), k[0], dq, input_precision=PRECISION)


@triton.jit
def query_grad_globals(
    dq,
    q,
    do,
    sources,
    masks,
    lse2,
    delta,
    row_hash,
    row_segments,
    batch,
    head,
    num_heads,
    num_globals,
    threshold,
    scale2,
    keep_scale,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LEAN: tl.constexpr,
):
    """Add what the global columns give to the query's gradient."""
    GLOBAL_KEY, GLOBAL_VALUE = sources
    GLOBAL_MASK, GLOBAL_SEGMENTS, GLOBAL_COLUMNS = masks
    if GLOBAL_KEY is not None:
        origin = (batch * num_globals * num_heads + head) * D
        block = tl.arange(0, GLOBAL_BLOCK)
        rows = block * (num_heads * D)
        for g0 in range(0, num_globals, GLOBAL_BLOCK):
            ok = g0 + block < num_globals
            at = batch * num_globals + g0 + block
            here = origin + g0 * (num_heads * D)
            k = load_tile(GLOBAL_KEY + here, rows, ok, True, D, BD, UPCAST)
            v = load_tile(GLOBAL_VALUE + here, rows, ok, True, D, BD, UPCAST)
            scores = dot_rows(q, k, D, BD, PRECISION, UPCAST, LEAN) * scale2
            scores = global_visible(scores, ok, at, GLOBAL_MASK, GLOBAL_SEGMENTS, row_segments)
            columns = block
            if HAS_DROPOUT:
                columns = tl.load(GLOBAL_COLUMNS + at, mask=ok, other=0).to(tl.int32)
            dq = query_grad_step(
                dq, scores, do, k, v, lse2, delta, row_hash, columns, threshold, keep_scale,
                HAS_DROPOUT, D, BD, PRECISION, UPCAST, LEAN,
            )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def query_grad_kernel(
    QUERY,  # [B, n, H, D] by strides
    KEY,  # [B, m, H, D] by strides
    VALUE,  # [B, m, H, D] by strides
    OUT,  # [B, n, H, D] contiguous
    OUT_GRAD,  # [B, n, H, D] contiguous
    LSE,  # [B, n, H] fp32 contiguous, natural logarithm
    DELTA,  # [B, n, H] fp32 contiguous, OUT: sum of out * out_grad, for the key kernels
    QUERY_GRAD,  # [B, n, H, D] contiguous, OUT
    WINDOWS,  # [3, H] int32: left, right, dilation
    KEY_MASK,  # [B, m] uint8 or None
    QUERY_SEGMENTS,  # [B, n] int32 or None
    KEY_SEGMENTS,  # [B, m] int32 or None
    GLOBAL_KEY,  # [B, G, H, D] contiguous or None
    GLOBAL_VALUE,  # [B, G, H, D] contiguous or None
    GLOBAL_MASK,  # [B, G] uint8 or None
    GLOBAL_SEGMENTS,  # [B, G] int32 or None
    BASES,  # [B, H] int32 or None: no dropout
    GLOBAL_COLUMNS,  # [B, G] int64 or None
    num_rows,
    buffer_rows,
    num_heads,
    num_globals,
    offset,
    low,
    high,
    first_row,
    threshold,
    scale,
    keep_scale,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LEAN: tl.constexpr,
):
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    left, right, step = load_window(WINDOWS, head, num_heads)
    residue, m0 = row_block(tl.program_id(0), num_rows, step, BM)
    rows_left = class_size(num_rows, residue, step) - m0
    if (residue >= step) | (rows_left <= 0):
        return
    block = tl.arange(0, BM)
    m = m0 + block
    rows_ok = block < rows_left
    i0 = residue + step * m0
    q_base = QUERY + batch * q_b + head * q_h + i0.to(tl.int64) * q_n
    q = load_tile(q_base, block * (step * q_n), rows_ok, True, D, BD, UPCAST)
    at = (batch * num_rows + i0) * num_heads + head
    spread = block * (step * num_heads)
    do = load_tile(OUT_GRAD + at * D, spread * D, rows_ok, True, D, BD, UPCAST)
    out = load_tile(OUT + at * D, spread * D, rows_ok, True, D, BD, UPCAST)
    delta = tl.sum(do[0].to(tl.float32) * out[0].to(tl.float32), 1)
    tl.store(DELTA + at + spread, delta, mask=rows_ok)
    # +inf where there is no row or no key: such rows have probability zero everywhere.
    lse2 = tl.load(LSE + at + spread, mask=rows_ok, other=float("inf")) * LOG2E
    HAS_DROPOUT: tl.constexpr = BASES is not None
    row_hash = hash_rows(BASES, tl.program_id(1), first_row + residue + step * m)
    row_segments = load_ids(QUERY_SEGMENTS, batch * num_rows + residue + step * m, rows_ok)
    dq = query_grad_globals(
        tl.zeros([BM, BD], tl.float32), q, do,
        (GLOBAL_KEY, GLOBAL_VALUE), (GLOBAL_MASK, GLOBAL_SEGMENTS, GLOBAL_COLUMNS),
        lse2, delta, row_hash, row_segments, batch, head, num_heads, num_globals, threshold,
        scale * LOG2E, keep_scale, HAS_DROPOUT, D, BD, PRECISION, UPCAST, LEAN,
    )  # fmt: skip

    shift = residue + offset
    u_low, u_high = class_bounds(low, high, shift, step)
    begin, inner, inner_end, end = band_tiles(
        m0, tl.minimum(BM, rows_left), left, right, u_low, u_high, BN
    )
    k_rows = tl.arange(0, BN) * (step * k_n)
    v_rows = tl.arange(0, BN) * (step * v_n)
    k_base = KEY + batch * k_b + head * k_h
    v_base = VALUE + batch * v_b + head * v_h
    for part in tl.static_range(1 if LEAN else 3):
        first, last = part_range(part, LEAN, begin, inner, inner_end, end)
        for u0 in range(first, last, BN):
            u = u0 + tl.arange(0, BN)
            j = shift + step * u
            j0 = (shift + step * u0).to(tl.int64)
            ok = u < u_high
            k = load_tile(k_base + j0 * k_n, k_rows, ok, part != 1, D, BD, UPCAST)
            v = load_tile(v_base + j0 * v_n, v_rows, ok, part != 1, D, BD, UPCAST)
            scores = dot_rows(q, k, D, BD, PRECISION, UPCAST, LEAN) * (scale * LOG2E)
            scores = key_visible(
                scores, u[None, :] - m[:, None], ok, batch * buffer_rows + j,
                KEY_MASK, KEY_SEGMENTS, row_segments, left, right, part != 1,
            )  # fmt: skip
            dq = query_grad_step(
                dq, scores, do, k, v, lse2, delta, row_hash, first_row - offset + j, threshold,
                keep_scale, HAS_DROPOUT, D, BD, PRECISION, UPCAST, LEAN,
            )  # fmt: skip
    store_tile(QUERY_GRAD + at * D, spread * D, dq * scale, rows_ok, D, BD)


def query_grad_arguments(
    operands: BandOperands, arch: str, rows: dict[str, Tensor], query_grad: Tensor
) -> tuple[Tile, dict[str, Any]]:
    """Tile and arguments of the query kernel; ``rows`` = OUT, OUT_GRAD, LSE, DELTA."""
    dtype = operands.query.dtype
    tile = tiles_for(arch, operands.query.shape[3], dtype).query_grad
    shared = shared_arguments(operands, arch, dot_precision(arch, dtype))
    own = {"BM": tile.block_rows, "BN": tile.block_columns, "LEAN": tile.lean}
    return tile, shared | rows | {"QUERY_GRAD": query_grad} | own


def key_grad_arguments(
    operands: BandOperands, arch: str, rows: dict[str, Tensor], grads: tuple[Tensor, Tensor]
) -> tuple[Tile, dict[str, Any]]:
    """Tile and arguments of the key kernel; ``rows`` = OUT_GRAD, LSE, DELTA."""
    dtype = operands.query.dtype
    tile = tiles_for(arch, operands.query.shape[3], dtype).key_grad
    shared = shared_arguments(operands, arch, dot_precision(arch, dtype))
    for name in [name for name in shared if name.startswith(("GLOBAL", "num_globals"))]:
        del shared[name]
    own = {"BM": tile.block_rows, "BN": tile.block_columns, "LEAN": tile.lean}
    return tile, shared | rows | {"KEY_GRAD": grads[0], "VALUE_GRAD": grads[1]} | own


def global_grad_arguments(
    operands: BandOperands, arch: str, rows: dict[str, Tensor], parts: tuple[Tensor, Tensor]
) -> tuple[Tile, dict[str, Any]]:
    """Tile and arguments of the global kernel; ``parts`` = [parts, B, G, H, D] fp32 twice."""
    dtype = operands.query.dtype
    tile = tiles_for(arch, operands.query.shape[3], dtype).global_grad
    shared = shared_arguments(operands, arch, dot_precision(arch, dtype))
    wanted = global_grad_kernel.arg_names
    shared = {name: value for name, value in shared.items() if name in wanted}
    own = {"rows_per_part": rows_per_part(operands.query.shape[1]), "BM": tile.block_rows}
    own["LEAN"] = tile.lean
    return tile, shared | rows | {"KEY_PARTS": parts[0], "VALUE_PARTS": parts[1]} | own


def rows_per_part(num_rows: int) -> int:
    """Query rows behind one partial sum of the global gradients, a multiple of every tile."""
    share = -(-num_rows // MAX_GLOBAL_PARTS)
    return MIN_ROWS_PER_PART * max(1, -(-share // MIN_ROWS_PER_PART))


def launch_backward(
    operands: BandOperands, out: Tensor, lse: Tensor, out_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run the backward kernels.

    Args:
        operands: The operands of the forward call.
        out: [B, n, H, D] result of the forward.
        lse: [B, n, H] fp32 result of the forward.
        out_grad: [B, n, H, D].

    Returns:
        Gradients of query, key, value (over the whole buffer), global_key and global_value, in
        their dtypes; None for the last two without global keys.
    """
    query, key = operands.query, operands.key
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, operands.value)
    ]
    arch = current_architecture(query.device)
    rows = {
        "OUT_GRAD": out_grad.contiguous(),
        "LSE": lse,
        "DELTA": torch.empty_like(lse),
    }
    with operands.device_guard():
        if query.numel():
            tile, arguments = query_grad_arguments(operands, arch, rows | {"OUT": out}, grads[0])
            grid = (operands.num_blocks(query.shape[1], tile.block_rows), operands.num_sample_heads)
            query_grad_kernel[grid](**arguments, **launch_options(tile))
        if key.numel():
            tile, arguments = key_grad_arguments(operands, arch, rows, (grads[1], grads[2]))
            blocks = operands.num_blocks(key.shape[1], tile.block_columns)
            key_grad_kernel[blocks, operands.num_sample_heads](**arguments, **launch_options(tile))
        if operands.global_key is None:
            return grads[0], grads[1], grads[2], None, None
        global_key_grad, global_value_grad = launch_global_grad(operands, arch, rows)
    return grads[0], grads[1], grads[2], global_key_grad, global_value_grad


def launch_global_grad(
    operands: BandOperands, arch: str, rows: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients [B, G, H, D] of the global keys and values: partial sums, then their sum."""
    source = operands.global_key
    assert source is not None
    num_rows = operands.query.shape[1]
    num_parts = -(-num_rows // rows_per_part(num_rows))
    key_parts = source.new_empty((num_parts, *source.shape), dtype=torch.float32)
    value_parts = torch.empty_like(key_parts)
    if key_parts.numel():
        tile, arguments = global_grad_arguments(operands, arch, rows, (key_parts, value_parts))
        blocks = -(-operands.num_globals // tile.block_columns)
        grid = (num_parts, operands.num_sample_heads, blocks)
        global_grad_kernel[grid](**arguments, **launch_options(tile))
    return key_parts.sum(dim=0).to(source.dtype), value_parts.sum(dim=0).to(source.dtype)
