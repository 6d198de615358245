"""Forward of the fused window attention: the Triton kernel and its launch on plain tensors."""

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
from haloformer.kernels.triton_parts import (
    GLOBAL_BLOCK,
    LN2,
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
    row_block,
    store_tile,
)


@triton.jit
def online_softmax(
    acc,
    row_sum,
    row_max,
    scores,
    v,
    row_hash,
    columns,
    threshold,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold one tile of base-2 scores [BM, BN] into the running softmax; the sum is undropped."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(kept(row_hash[:, None], columns[None, :], threshold), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def attend_globals(
    state,
    q,
    sources,
    masks,
    row_hash,
    row_segments,
    batch,
    head,
    num_heads,
    num_globals,
    threshold,
    scale2,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LEAN: tl.constexpr,
):
    """Fold the global columns of one example into the running softmax."""
    acc, row_sum, row_max = state
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
            acc, row_sum, row_max = online_softmax(
                acc, row_sum, row_max, scores, v[0], row_hash, columns, threshold,
                HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    QUERY,  # [B, n, H, D] by strides
    KEY,  # [B, m, H, D] by strides
    VALUE,  # [B, m, H, D] by strides
    OUT,  # [B, n, H, D] contiguous, OUT
    LSE,  # [B, n, H] fp32 contiguous, OUT: natural logarithm, +inf on rows without a key
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
    HAS_DROPOUT: tl.constexpr = BASES is not None
    row_hash = hash_rows(BASES, tl.program_id(1), first_row + residue + step * m)
    row_segments = load_ids(QUERY_SEGMENTS, batch * num_rows + residue + step * m, rows_ok)
    state = (
        tl.zeros([BM, BD], tl.float32),
        tl.zeros([BM], tl.float32),
        tl.full([BM], float("-inf"), tl.float32),
    )
    acc, row_sum, row_max = attend_globals(
        state, q, (GLOBAL_KEY, GLOBAL_VALUE), (GLOBAL_MASK, GLOBAL_SEGMENTS, GLOBAL_COLUMNS),
        row_hash, row_segments, batch, head, num_heads, num_globals, threshold, scale * LOG2E,
        HAS_DROPOUT, D, BD, PRECISION, UPCAST, LEAN,
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
            acc, row_sum, row_max = online_softmax(
                acc, row_sum, row_max, scores, v[0], row_hash, first_row - offset + j, threshold,
                HAS_DROPOUT, PRECISION,
            )  # fmt: skip

    some = row_sum > 0.0
    total = tl.where(some, row_sum, 1.0)
    out = acc * (keep_scale / total)[:, None]
    lse = tl.where(some, (row_max + tl.log2(total)) * LN2, float("inf"))
    at = (batch * num_rows + i0) * num_heads + head
    spread = block * (step * num_heads)
    store_tile(OUT + at * D, spread * D, out, rows_ok, D, BD)
    tl.store(LSE + at + spread, lse, mask=rows_ok)


def forward_arguments(
    operands: BandOperands, arch: str, out: Tensor, lse: Tensor
) -> tuple[Tile, dict[str, Any]]:
    """Tile and arguments of the forward kernel on an architecture."""
    dtype = operands.query.dtype
    tile = tiles_for(arch, operands.query.shape[3], dtype).forward
    arguments = shared_arguments(operands, arch, dot_precision(arch, dtype))
    return tile, arguments | {
        "OUT": out,
        "LSE": lse,
        "BM": tile.block_rows,
        "BN": tile.block_columns,
        "LEAN": tile.lean,
    }


def launch_forward(operands: BandOperands) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        operands: The operands of one call, checked by the caller.

    Returns:
        out [B, n, H, D] in the dtype of the query, and lse [B, n, H] fp32.
    """
    query = operands.query
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel():
        arch = current_architecture(query.device)
        tile, arguments = forward_arguments(operands, arch, out, lse)
        grid = (operands.num_blocks(query.shape[1], tile.block_rows), operands.num_sample_heads)
        with operands.device_guard():
            forward_kernel[grid](**arguments, **launch_options(tile))
    return out, lse
