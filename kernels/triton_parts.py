"""Pieces that the forward and the backward Triton kernels share: device functions only.

Index space of a head with dilation d. A program owns one residue class r of the rows: its m-th
row is query row ``r + d*m`` and column u of the class is buffer row ``r + offset + d*u``. Inside a
class the dilated window is a dense window, ``-left <= u - m <= right``, so no score is computed
only to be masked by the dilation::

    n=6, offset=0, d=2, left=right=1      class 0: rows 0 2 4   m = 0 1 2
                                          class 1: rows 1 3 5   m = 0 1 2
    row 2 (r=0, m=1) sees u = 0 1 2, that is buffer rows 0 2 4.
"""

import triton
import triton.language as tl

# One block of global columns: the smallest that a tensor core takes.
GLOBAL_BLOCK = tl.constexpr(16)
# Features that a lean kernel multiplies at once.
LEAN_CHUNK = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def floor_div(a, b):
    """Floor of a / b for b > 0; the compiler's // truncates (-7 // 2 = -3)."""
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))


@triton.jit
def load_window(WINDOWS, head, num_heads):
    """Left, right and dilation of a head."""
    left = tl.load(WINDOWS + head)
    right = tl.load(WINDOWS + num_heads + head)
    return left, right, tl.load(WINDOWS + 2 * num_heads + head)


@triton.jit
def part_range(part: tl.constexpr, LEAN: tl.constexpr, begin, inner, inner_end, end):
    """Range of part 0, 1 or 2 of what :func:`band_tiles` returned: edge, interior, edge.

    Lean code has one part with the band mask everywhere.
    """
    if LEAN:
        return begin, end
    elif part == 0:
        return begin, tl.minimum(inner, end)
    elif part == 1:
        return inner, inner_end
    else:
        return inner_end, end


@triton.jit
def row_block(pid, num_rows, step, BLOCK: tl.constexpr):
    """Residue class and first row within it of program ``pid``; the last are beyond the end."""
    per_class = tl.cdiv(tl.cdiv(num_rows, step), BLOCK)
    return pid // per_class, (pid % per_class) * BLOCK


@triton.jit
def class_size(num_rows, residue, step):
    """How many of ``num_rows`` rows are in a residue class."""
    return (num_rows - residue + step - 1) // step


@triton.jit
def class_bounds(low, high, shift, step):
    """Half-open range of u with ``low <= shift + step*u < high``."""
    return -floor_div(shift - low, step), -floor_div(shift - high, step)


@triton.jit
def band_tiles(first, size, before, after, low, high, STEP: tl.constexpr):
    """Where to walk the other side of the band, in tiles of STEP.

    The own tile is ``first .. first+size-1``; position x of the other side belongs to own position
    p when ``-before <= x - p <= after``. Tiles [begin, inner) and [inner_end, end) need the band
    mask, tiles [inner, inner_end) lie wholly inside it.
    """
    begin = tl.maximum(first - before, low)
    end = tl.minimum(first + size + after, high)
    inner = begin + tl.cdiv(tl.maximum(first + size - 1 - before - begin, 0), STEP) * STEP
    room = tl.minimum(first + after + 1, high) - inner
    inner_end = inner + tl.maximum(room, 0) // STEP * STEP
    return begin, inner, inner_end, end


@triton.jit
def load_tile(
    base,
    rows,
    ok,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile [ROWS, BD] of rows at ``base + rows``, zeros where masked and beyond head_dim D.

    Returns (tile, base, rows, ok): the tile and where it came from, as :func:`dot_rows` wants it.
    """
    offsets = rows[:, None] + tl.arange(0, BD)[None, :]
    if D != BD:
        x = tl.load(base + offsets, mask=ok[:, None] & (tl.arange(0, BD) < D)[None, :], other=0.0)
    elif MASK:
        x = tl.load(base + offsets, mask=ok[:, None], other=0.0)
    else:
        x = tl.load(base + offsets)
    if UPCAST:  # the interpreter's bf16 arithmetic is garbage
        x = x.to(tl.float32)
    return x, base, rows, ok


@triton.jit
def store_tile(base, rows, x, ok, D: tl.constexpr, BD: tl.constexpr):
    """Store a tile [ROWS, BD] in the dtype of the pointer."""
    feature = tl.arange(0, BD)[None, :]
    tl.store(
        base + rows[:, None] + feature,
        x.to(base.dtype.element_ty),
        mask=ok[:, None] & (feature < D),
    )


@triton.jit
def dot_rows(
    a,
    b,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LEAN: tl.constexpr,
):
    """Product a @ b.T of two tiles from :func:`load_tile`.

    Lean: loaded once more, in chunks of the feature dimension. An fp32 operand split for three
    products takes so many registers that wide heads spill; a loop that the compiler may not unroll
    holds one chunk at a time. Unused whole tiles are then dropped by the compiler.
    """
    if LEAN:
        a_tile, a_base, a_rows, a_ok = a
        b_tile, b_base, b_rows, b_ok = b
        product = tl.zeros([a_tile.shape[0], b_tile.shape[0]], tl.float32)
        for start in range(0, BD, LEAN_CHUNK):
            f = start + tl.arange(0, LEAN_CHUNK)
            real = f < D
            x = tl.load(
                a_base + a_rows[:, None] + f[None, :], mask=a_ok[:, None] & real[None, :], other=0.0
            )
            y = tl.load(
                b_base + b_rows[None, :] + f[:, None], mask=b_ok[None, :] & real[:, None], other=0.0
            )
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            product = tl.dot(x, y, product, input_precision=PRECISION)
        return product
    else:
        return tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)


@triton.jit
def mix32(x):
    """lowbias32 on uint32, bit for bit that of ``dropout.mix32_``."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def hash_rows(BASES, sample_head, rows):
    """uint32 hash of (sample, head, position of the row); without dropout nothing of use."""
    if BASES is not None:
        base = tl.load(BASES + sample_head).to(tl.uint32, bitcast=True)
        return mix32(base + rows.to(tl.uint32) * 0x9E3779B9)
    else:
        return rows


@triton.jit
def load_ids(IDS, at, ok):
    """Segment ids, or something of their shape where there are none."""
    if IDS is not None:
        return tl.load(IDS + at, mask=ok, other=0)
    else:
        return at


@triton.jit
def kept(row_hash, columns, threshold):
    """Which elements dropout keeps; ``row_hash`` and ``columns`` broadcast."""
    bits = mix32(row_hash + columns.to(tl.uint32) * 0x85EBCA6B)
    return (bits & 0x7FFFFFFF) >= threshold.to(tl.uint32)


@triton.jit
def key_visible(
    scores,
    away,
    ok,
    keys,
    KEY_MASK,
    KEY_SEGMENTS,
    row_segments,
    left,
    right,
    EDGE: tl.constexpr,
):
    """Scores [BM, BN] of band keys, -inf where the row may not see the key.

    ``away`` is u - m, ``ok`` which keys exist, ``keys`` their index in KEY_MASK and KEY_SEGMENTS.
    """
    if EDGE:
        seen = (away >= -left) & (away <= right) & ok[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    if KEY_MASK is not None:
        real = tl.load(KEY_MASK + keys, mask=ok, other=0) != 0
        scores = tl.where(real[None, :], scores, float("-inf"))
    if KEY_SEGMENTS is not None:
        segments = tl.load(KEY_SEGMENTS + keys, mask=ok, other=0)
        scores = tl.where(row_segments[:, None] == segments[None, :], scores, float("-inf"))
    return scores


@triton.jit
def global_visible(scores, ok, at, GLOBAL_MASK, GLOBAL_SEGMENTS, row_segments):
    """Scores [BM, 16] of global keys, -inf where the row may not see the key."""
    if GLOBAL_MASK is not None:
        real = tl.load(GLOBAL_MASK + at, mask=ok, other=0) != 0
        scores = tl.where(real[None, :], scores, float("-inf"))
    if GLOBAL_SEGMENTS is not None:
        segments = tl.load(GLOBAL_SEGMENTS + at, mask=ok, other=0)
        scores = tl.where(row_segments[:, None] == segments[None, :], scores, float("-inf"))
    return tl.where(ok[None, :], scores, float("-inf"))


@triton.jit
def probability_grads(scores, lse2, dp, delta, keep, keep_scale, HAS_DROPOUT: tl.constexpr):
    """Probabilities as they met the values, and gradient of the scaled scores.

    ``keep`` is what dropout kept; ``lse2`` and ``delta`` come broadcast to the scores' shape. The
    dropped probabilities lack the factor ``keep_scale``, which the caller applies once at its end.
    """
    p = tl.exp2(scores - lse2)
    if HAS_DROPOUT:
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        return dropped, p * (dp - delta)
    return p, p * (dp - delta)
