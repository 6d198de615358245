"""Backward of the fused window attention: gradients of keys and values, in the band and global.

A program owns a tile of keys and walks the query rows that see it: the mirror of the forward. With
columns j = c + d*v of a residue class and rows i = c - offset + d*w, row w sees column v when
``-right <= w - v <= left``: the window with its sides exchanged.
"""

import triton
import triton.language as tl

from haloformer.kernels.operands import RUNTIME_INTEGERS
from haloformer.kernels.triton_parts import (
    GLOBAL_BLOCK,
    LOG2E,
    band_tiles,
    class_bounds,
    class_size,
    dot_rows,
    hash_rows,
    kept,
    load_ids,
    load_tile,
    load_window,
    part_range,
    probability_grads,
    row_block,
    store_tile,
)


@triton.jit
def key_grad_step(
    dk,
    dv,
    scores,
    q,
    do,
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
    """Add what one tile of masked base-2 scores, transposed [BN, BM], gives to keys and values."""
    dp = dot_rows(v, do, D, BD, PRECISION, UPCAST, LEAN)
    keep = dp
    if HAS_DROPOUT:
        keep = kept(row_hash[None, :], columns[:, None], threshold)
    p, ds = probability_grads(
        scores, lse2[None, :], dp, delta[None, :], keep, keep_scale, HAS_DROPOUT
    )
    dv = tl.dot(p.to(do[0].dtype), do[0], dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q[0].dtype), q[0], dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def load_rows(
    QUERY, OUT_GRAD, LSE, DELTA, q_here, here, q_rows, spread, ok,
    MASK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Query rows and what the forward left for them; no row has LSE = +inf, so no probability."""
    q = load_tile(QUERY + q_here, q_rows, ok, MASK, D, BD, UPCAST)
    do = load_tile(OUT_GRAD + here * D, spread * D, ok, MASK, D, BD, UPCAST)
    lse2 = tl.load(LSE + here + spread, mask=ok, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + here + spread, mask=ok, other=0.0)
    return q, do, lse2, delta


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def key_grad_kernel(
    QUERY,  # [B, n, H, D] by strides
    KEY,  # [B, m, H, D] by strides
    VALUE,  # [B, m, H, D] by strides
    OUT_GRAD,  # [B, n, H, D] contiguous
    LSE,  # [B, n, H] fp32 contiguous, natural logarithm
    DELTA,  # [B, n, H] fp32 contiguous: sum of out * out_grad
    KEY_GRAD,  # [B, m, H, D] contiguous, OUT
    VALUE_GRAD,  # [B, m, H, D] contiguous, OUT
    WINDOWS,  # [3, H] int32: left, right, dilation
    KEY_MASK,  # [B, m] uint8 or None
    QUERY_SEGMENTS,  # [B, n] int32 or None
    KEY_SEGMENTS,  # [B, m] int32 or None
    BASES,  # [B, H] int32 or None: no dropout
    num_rows,
    buffer_rows,
    num_heads,
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
    residue, c0 = row_block(tl.program_id(0), buffer_rows, step, BN)
    keys_left = class_size(buffer_rows, residue, step) - c0
    if (residue >= step) | (keys_left <= 0):
        return
    block = tl.arange(0, BN)
    c = c0 + block
    j0 = residue + step * c0
    j = residue + step * c
    keys_ok = block < keys_left
    real = keys_ok & (j >= low) & (j < high)
    k_base = KEY + batch * k_b + head * k_h + j0.to(tl.int64) * k_n
    v_base = VALUE + batch * v_b + head * v_h + j0.to(tl.int64) * v_n
    k = load_tile(k_base, block * (step * k_n), real, True, D, BD, UPCAST)
    v = load_tile(v_base, block * (step * v_n), real, True, D, BD, UPCAST)
    if KEY_MASK is not None:
        real = real & (tl.load(KEY_MASK + batch * buffer_rows + j, mask=keys_ok, other=0) != 0)
    key_segments = load_ids(KEY_SEGMENTS, batch * buffer_rows + j, keys_ok)
    HAS_DROPOUT: tl.constexpr = BASES is not None
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)

    shift = residue - offset
    w_low, w_high = class_bounds(0, num_rows, shift, step)
    begin, inner, inner_end, end = band_tiles(
        c0, tl.minimum(BN, keys_left), right, left, w_low, w_high, BM
    )
    spread = tl.arange(0, BM) * (step * num_heads)
    q_rows = tl.arange(0, BM) * (step * q_n)
    for part in tl.static_range(1 if LEAN else 3):
        first, last = part_range(part, LEAN, begin, inner, inner_end, end)
        for w0 in range(first, last, BM):
            w = w0 + tl.arange(0, BM)
            i = shift + step * w
            i0 = (shift + step * w0).to(tl.int64)
            ok = w < w_high
            q, do, lse2, delta = load_rows(
                QUERY, OUT_GRAD, LSE, DELTA,
                batch * q_b + head * q_h + i0 * q_n, (batch * num_rows + i0) * num_heads + head,
                q_rows, spread, ok, part != 1, D, BD, UPCAST,
            )  # fmt: skip
            scores = dot_rows(k, q, D, BD, PRECISION, UPCAST, LEAN) * (scale * LOG2E)
            if part != 1:
                away = w[None, :] - c[:, None]
                seen = (away >= -right) & (away <= left)
                scores = tl.where(seen, scores, float("-inf"))
            if QUERY_SEGMENTS is not None:
                segments = tl.load(QUERY_SEGMENTS + batch * num_rows + i, mask=ok, other=0)
                same = key_segments[:, None] == segments[None, :]
                scores = tl.where(same, scores, float("-inf"))
            row_hash = hash_rows(BASES, tl.program_id(1), first_row + i)
            dk, dv = key_grad_step(
                dk, dv, scores, q, do, v, lse2, delta, row_hash, first_row - offset + j,
                threshold, keep_scale, HAS_DROPOUT, D, BD, PRECISION, UPCAST, LEAN,
            )  # fmt: skip

    # Every key gathers by itself, so a key that nobody may see is put right once, here.
    dk = tl.where(real[:, None], dk * scale, 0.0)
    dv = tl.where(real[:, None], dv * keep_scale, 0.0)
    at = ((batch * buffer_rows + j0) * num_heads + head) * D
    key_rows = block * (step * num_heads * D)
    store_tile(KEY_GRAD + at, key_rows, dk, keys_ok, D, BD)
    store_tile(VALUE_GRAD + at, key_rows, dv, keys_ok, D, BD)


@triton.jit(do_not_specialize=[*RUNTIME_INTEGERS, "rows_per_part"])
def global_grad_kernel(
    QUERY,  # [B, n, H, D] by strides
    OUT_GRAD,  # [B, n, H, D] contiguous
    LSE,  # [B, n, H] fp32 contiguous, natural logarithm
    DELTA,  # [B, n, H] fp32 contiguous: sum of out * out_grad
    KEY_PARTS,  # [parts, B, G, H, D] fp32 contiguous, OUT
    VALUE_PARTS,  # [parts, B, G, H, D] fp32 contiguous, OUT
    QUERY_SEGMENTS,  # [B, n] int32 or None
    GLOBAL_KEY,  # [B, G, H, D] contiguous
    GLOBAL_VALUE,  # [B, G, H, D] contiguous
    GLOBAL_MASK,  # [B, G] uint8 or None
    GLOBAL_SEGMENTS,  # [B, G] int32 or None
    BASES,  # [B, H] int32 or None: no dropout
    GLOBAL_COLUMNS,  # [B, G] int64 or None
    num_rows,
    num_heads,
    num_globals,
    first_row,
    threshold,
    rows_per_part,
    scale,
    keep_scale,
    q_b,
    q_n,
    q_h,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LEAN: tl.constexpr,
):
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    part = tl.program_id(0)
    block = tl.program_id(2) * GLOBAL_BLOCK + tl.arange(0, GLOBAL_BLOCK)
    ok = block < num_globals
    at = batch * num_globals + block
    origin = (batch * num_globals * num_heads + head) * D
    rows = block * (num_heads * D)
    k = load_tile(GLOBAL_KEY + origin, rows, ok, True, D, BD, UPCAST)
    v = load_tile(GLOBAL_VALUE + origin, rows, ok, True, D, BD, UPCAST)
    real = ok
    if GLOBAL_MASK is not None:
        real = real & (tl.load(GLOBAL_MASK + at, mask=ok, other=0) != 0)
    key_segments = load_ids(GLOBAL_SEGMENTS, at, ok)
    columns = load_ids(GLOBAL_COLUMNS, at, ok).to(tl.int32)
    HAS_DROPOUT: tl.constexpr = BASES is not None
    # Transposed, [BD, 16]: a warpgroup multiplies at least 64 rows by 16 columns, never 16 by 64.
    dk = tl.zeros([BD, GLOBAL_BLOCK], tl.float32)
    dv = tl.zeros([BD, GLOBAL_BLOCK], tl.float32)

    spread = tl.arange(0, BM) * num_heads
    q_rows = tl.arange(0, BM) * q_n
    first = part * rows_per_part
    for i0 in range(first, tl.minimum(first + rows_per_part, num_rows), BM):
        i = i0 + tl.arange(0, BM)
        rows_ok = i < num_rows
        row0 = (first + (i0 - first)).to(tl.int64)
        q, do, lse2, delta = load_rows(
            QUERY, OUT_GRAD, LSE, DELTA,
            batch * q_b + head * q_h + row0 * q_n, (batch * num_rows + row0) * num_heads + head,
            q_rows, spread, rows_ok, True, D, BD, UPCAST,
        )  # fmt: skip
        scores = dot_rows(q, k, D, BD, PRECISION, UPCAST, LEAN) * (scale * LOG2E)
        if GLOBAL_SEGMENTS is not None:
            segments = tl.load(QUERY_SEGMENTS + batch * num_rows + i, mask=rows_ok, other=0)
            same = segments[:, None] == key_segments[None, :]
            scores = tl.where(same, scores, float("-inf"))
        dp = dot_rows(do, v, D, BD, PRECISION, UPCAST, LEAN)
        keep = dp
        if HAS_DROPOUT:
            row_hash = hash_rows(BASES, tl.program_id(1), first_row + i)
            keep = kept(row_hash[:, None], columns[None, :], threshold)
        p, ds = probability_grads(
            scores, lse2[:, None], dp, delta[:, None], keep, keep_scale, HAS_DROPOUT
        )
        dv = tl.dot(tl.trans(do[0]), p.to(do[0].dtype), dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(q[0]), ds.to(q[0].dtype), dk, input_precision=PRECISION)

    dk = tl.where(real[:, None], tl.trans(dk) * scale, 0.0)
    dv = tl.where(real[:, None], tl.trans(dv) * keep_scale, 0.0)
    samples = tl.num_programs(1).to(tl.int64) * num_globals * D
    store_tile(KEY_PARTS + part * samples + origin, rows, dk, ok, D, BD)
    store_tile(VALUE_PARTS + part * samples + origin, rows, dv, ok, D, BD)
