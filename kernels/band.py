"""The low-level input of every backend: where queries stand against a buffer of keys.

A backend is one function with this signature (``chunks.window_attention``,
``fused.window_attention``)::

    window_attention(query, key, value, global_key, global_value, band) -> (out, lse)

    query         [B, n, H, D]   rows of this device
    key, value    [B, m, H, D]   buffer of halo_left + n + halo_right rows
    global_key    [B, G, H, D]   or None; joins the same softmax, seen by every row
    global_value  [B, G, H, D]   or None
    out           [B, n, H, D]   in the dtype of the query; rows without a key are zero
    lse           [B, n, H]      natural log, float32 (float64 for float64 inputs), +inf on rows
                                 without a key; no gradient flows through it

Gradients of key and value come out over the whole buffer, halo included, so that the caller can
send them home. Masked keys and keys outside ``valid`` get exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.spec import WindowSpec


@dataclass(frozen=True)
class Band:
    """Which keys each query row may attend, apart from the numbers themselves.

    Query row i stands on buffer row i + offset; buffer rows outside ``valid`` lie beyond the end
    of the sequence (windows truncate there) and hold zeros. One device has offset 0 and
    valid (0, n)::

        rank 1 of 3, n=2, reach 3 to the left, 1 to the right (N=6, so the buffer is rows -1..4)

        position      -1   0   1 | 2   3 | 4
        buffer row     0   1   2 | 3   4 | 5      offset=3, valid=(1, 6)
        query row                | 0   1 |

    Attributes:
        spec: The window of each of the H heads.
        offset: Buffer row of query row 0; need not be a multiple of any dilation.
        valid: Half-open range of buffer rows that exist.
        key_mask: [B, m] bool, True = may be attended in the band; None = all.
        query_segments: [B, n] integers; a row sees only keys of its own segment. None = no
            segments, and then key_segments is None as well.
        key_segments: [B, m] integers.
        global_mask: [B, G] bool, True = a real global key; None = all real.
        global_segments: [B, G] integers; None = global keys are seen by all segments.
        dropout: Dropout of the softmax, or None. Query row i is sequence position
            ``dropout.first_row + i``, buffer row j is column ``dropout.first_row - offset + j``,
            global key g is column ``dropout.global_columns[b, g]``.
    """

    spec: WindowSpec
    offset: int
    valid: tuple[int, int]
    key_mask: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    global_mask: Tensor | None = None
    global_segments: Tensor | None = None
    dropout: AttentionDropout | None = None


@dataclass(frozen=True)
class BandKernel:
    """A backend's two halves without autograd, for who orders them himself (``overlap``).

    Attributes:
        forward: ``(query, key, value, global_key, global_value, band) -> (out, stats)``; the
            statistics are the backend's own, for its backward. Global tensors may have no rows.
        backward: ``(grad_out, out, stats, query, key, value, global_key, global_value, band)`` ->
            gradients of the five inputs, in their dtypes.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Band], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Band],
        tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    ]


def computed(x: Tensor) -> Tensor:
    """In the precision of the arithmetic outside of the fused kernel: at least float32."""
    return x if x.dtype == torch.float64 else x.float()
