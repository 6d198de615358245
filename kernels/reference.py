"""The definition of truth: Longformer attention as loops, one row of one head at a time.

Every other implementation is held to these functions, forward and gradient. Run them in float64,
on a few dozen tokens, in tests. Autograd differentiates them as they stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haloformer.kernels.band import Band, BandKernel
from haloformer.kernels.dropout import AttentionDropout, keep_mask
from haloformer.kernels.spec import WindowSpec


def in_window(spec: WindowSpec, head: int, distance: int) -> bool:
    """Whether a row may attend the key ``distance`` places to its right (left: negative)."""
    left, right, d = spec.left[head], spec.right[head], spec.dilation[head]
    return distance % d == 0 and -left * d <= distance <= right * d


def attend(query: Tensor, keys: Tensor, values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of one row of one head; a row with no key at all gives zeros.

    Args:
        query: [D].
        keys: [K, D].
        values: [K, D].
        keep: [K], what dropout multiplies each weight with: 0 or 1 / (1 - rate).

    Returns:
        The row [D], and the log-sum-exp of its logits, +inf if there are none.
    """
    if keys.shape[0] == 0:
        return torch.zeros_like(query), query.new_tensor(torch.inf)
    logits = keys @ query / query.shape[0] ** 0.5
    weights = torch.softmax(logits, dim=0) * keep
    return weights @ values, torch.logsumexp(logits.detach(), dim=0)


def keep_factors(
    dropout: AttentionDropout | None, base: Tensor | None, row: int, columns: list[int]
) -> Tensor:
    """[K] float64: what dropout does to the weights of one row, by positions in the sequence."""
    if dropout is None or base is None:
        return torch.ones(len(columns), dtype=torch.float64)
    keep = keep_mask(base, torch.tensor(row), torch.tensor(columns), dropout.rate)
    return keep.double() / (1.0 - dropout.rate)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    band: Band,
) -> tuple[Tensor, Tensor]:
    """The low-level op of :mod:`haloformer.kernels.band`, by loops.

    Args:
        query: [B, n, H, D].
        key: [B, m, H, D].
        value: [B, m, H, D].
        global_key: [B, G, H, D] or None.
        global_value: [B, G, H, D] or None.
        band: Who may see whom.

    Returns:
        Output [B, n, H, D] and log-sum-exp [B, n, H], +inf on rows without a key.
    """
    num_batch, n, num_heads, head_dim = query.shape
    if global_key is None or global_value is None:
        global_key = global_value = query.new_zeros(num_batch, 0, num_heads, head_dim)
    dropout = band.dropout
    bases = dropout.bases(num_heads) if dropout is not None else None
    first = dropout.first_row if dropout is not None else 0
    found = []
    for b in range(num_batch):
        for h in range(num_heads):
            for i in range(n):
                g = visible_globals(band, global_key.shape[1], b, i)
                j = visible_keys(band, b, i, h)
                columns = far_columns(dropout, b, g) + [first - band.offset + x for x in j]
                base = bases[b, h] if bases is not None else None
                keys = torch.cat([global_key[b, g, h], key[b, j, h]])
                values = torch.cat([global_value[b, g, h], value[b, j, h]])
                keep = keep_factors(dropout, base, first + i, columns).to(query.dtype)
                found.append(attend(query[b, i, h], keys, values, keep))
    out = torch.stack([row for row, _ in found]).view(num_batch, num_heads, n, head_dim)
    lse = torch.stack([x for _, x in found]).view(num_batch, num_heads, n)
    return out.transpose(1, 2), lse.transpose(1, 2)


def far_columns(dropout: AttentionDropout | None, b: int, g: list[int]) -> list[int]:
    """Positions in the sequence of some global keys, which only dropout asks for."""
    if dropout is None or dropout.global_columns is None:
        return [0 for _ in g]
    return [int(dropout.global_columns[b, x]) for x in g]


def same_segment(a: Tensor | None, i: int, b: Tensor | None, j: int, example: int) -> bool:
    """Whether two rows belong to one document; without segments everything does."""
    return a is None or b is None or bool(a[example, i] == b[example, j])


def visible_globals(band: Band, num_globals: int, b: int, i: int) -> list[int]:
    """Numbers of the global keys that query row i attends."""
    return [
        g
        for g in range(num_globals)
        if (band.global_mask is None or band.global_mask[b, g])
        and same_segment(band.query_segments, i, band.global_segments, g, b)
    ]


def visible_keys(band: Band, b: int, i: int, h: int) -> list[int]:
    """Buffer rows that query row i attends through the window of head h."""
    return [
        j
        for j in range(*band.valid)
        if in_window(band.spec, h, j - (i + band.offset))
        and (band.key_mask is None or band.key_mask[b, j])
        and same_segment(band.query_segments, i, band.key_segments, j, b)
    ]


def longformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_query: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    spec: WindowSpec,
    *,
    attention_mask: Tensor,
    segment_ids: Tensor | None,
    global_positions: Tensor,
    global_mask: Tensor,
    band_dropout: AttentionDropout | None = None,
    global_dropout: AttentionDropout | None = None,
) -> Tensor:
    """A whole attention layer on one whole sequence: what the sharded op must equal.

    ::

        N=6, left=right=1, token 0 global, token 5 padding        l = local projections
                                                                  g = global projections
        row 0  g g g g g .     a global row sees every real token
        row 1  l l l . . .     others see their window and the global tokens,
        row 2  l l l l . .     each key once, in one softmax
        row 3  l . l l l .
        row 4  l . . l l .
        row 5  . . . . . .     padding: zeros

    Args:
        query: [B, N, H, D], and so are key, value, global_key and global_value.
        key: Local projections.
        value: Local projections.
        global_query: [B, G, H, D], the global tokens' queries.
        global_key: Keys of all tokens for the global rows.
        global_value: Values of all tokens for the global rows.
        spec: Window per head.
        attention_mask: [B, N] bool, True = a real token.
        segment_ids: [B, N] integers, tokens see only their own segment; None = one document.
        global_positions: [B, G] int64.
        global_mask: [B, G] bool, False = an unused slot.
        band_dropout: Dropout of the windowed rows.
        global_dropout: Dropout of the global rows.

    Returns:
        [B, N, H, D].
    """
    num_batch, length, num_heads, head_dim = query.shape
    band_bases = band_dropout.bases(num_heads) if band_dropout is not None else None
    global_bases = global_dropout.bases(num_heads) if global_dropout is not None else None
    rows = []
    for b in range(num_batch):
        slots = {
            int(position): g for g, position in enumerate(global_positions[b]) if global_mask[b, g]
        }
        real = [j for j in range(length) if attention_mask[b, j]]
        for h in range(num_heads):
            for i in range(length):
                seen = [j for j in real if same_segment(segment_ids, i, segment_ids, j, b)]
                if i not in real:
                    seen = []
                if i in slots:
                    q, k, v = global_query[b, slots[i], h], global_key, global_value
                    dropout, bases = global_dropout, global_bases
                else:
                    seen = [j for j in seen if j in slots or in_window(spec, h, j - i)]
                    q, k, v = query[b, i, h], key, value
                    dropout, bases = band_dropout, band_bases
                base = bases[b, h] if bases is not None else None
                keep = keep_factors(dropout, base, i, seen).to(query.dtype)
                rows.append(attend(q, k[b, seen, h], v[b, seen, h], keep)[0])
    return torch.stack(rows).view(num_batch, num_heads, length, head_dim).transpose(1, 2)


def _backward_piece(
    grad_out: Tensor,
    out: Tensor,
    stats: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    band: Band,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by autograd: the loops are run once more."""
    inputs = [x.detach().requires_grad_() for x in (query, key, value, global_key, global_value)]
    q, k, v, g_k, g_v = inputs
    with torch.enable_grad():
        again, _ = window_attention(q, k, v, g_k, g_v, band)
        again = again + 0.0 * q  # depends on something even where no row sees a key
    dq, dk, dv, dgk, dgv = torch.autograd.grad(
        again, inputs, grad_out, allow_unused=True, materialize_grads=True
    )
    return dq, dk, dv, dgk, dgv


KERNEL = BandKernel(window_attention, _backward_piece)
