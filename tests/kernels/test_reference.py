"""The definition of truth against numbers worked out another way: a dense, masked softmax."""

import torch

from cases import LAYER_CASES, LayerCase
from haloformer.kernels import reference
from haloformer.kernels.band import Band
from haloformer.kernels.spec import WindowSpec

DRAWING = """
1 1 . . . .    1 . 1 . . .
1 1 1 . . .    . 1 . 1 . .
. 1 1 1 . .    1 . 1 . 1 .
. . 1 1 1 .    . 1 . 1 . 1
. . . 1 1 1    . . 1 . 1 .
. . . . 1 1    . . . 1 . 1
"""


def weights_of(band, n):
    """Attention weights [n, H, n], read off by attending one-hot values of zero logits."""
    num_heads = band.spec.num_heads
    zeros = torch.zeros(1, n, num_heads, n, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)[None, :, None].expand(1, n, num_heads, n)
    return reference.window_attention(zeros, zeros, eye, None, None, band)[0][0]


def test_the_window_is_the_one_drawn_in_spec():
    weights = weights_of(Band(WindowSpec((1, 1), (1, 1), (1, 2)), 0, (0, 6)), 6)
    drawn = ["".join(line.split()) for line in DRAWING.strip().splitlines()]
    for head in range(2):
        for row in range(6):
            cells = drawn[row][6 * head : 6 * head + 6]
            expected = torch.tensor([1.0 if c == "1" else 0.0 for c in cells]).double()
            torch.testing.assert_close(weights[row, head], expected / expected.sum())


def test_windows_truncate_and_causal_looks_left_only():
    weights = weights_of(Band(WindowSpec((2,), (0,), (1,)), 0, (0, 4)), 4)[:, 0]
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]).double()
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True))


def dense_layer(case):
    """The whole layer as two dense masked softmaxes: no loops over rows, no shared code."""
    query, key, value, global_query, global_key, global_value, _ = case.tensors()
    shard = case.shard()
    positions = torch.arange(case.length)
    distance = positions[None, :] - positions[:, None]
    real = shard.attention_mask
    same = torch.ones(real.shape[0], case.length, case.length, dtype=torch.bool)
    if shard.segment_ids is not None:
        same = shard.segment_ids[:, :, None] == shard.segment_ids[:, None]
    same = same & real[:, None] & real[:, :, None]
    is_global = torch.zeros_like(real)
    for example, places in enumerate(case.globals_):
        is_global[example, list(places)] = True
    windows = torch.stack(
        [
            (distance % d == 0) & (distance >= -a * d) & (distance <= b * d)
            for a, b, d in zip(case.left, case.right, case.dilation, strict=True)
        ]
    )
    local = same[:, None] & (windows[None] | is_global[:, None, None])
    full_query = torch.zeros_like(query)
    for example, places in enumerate(case.globals_):
        full_query[example, list(places)] = global_query[example, : len(places)]

    def softmax(q, k, v, mask):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / case.head_dim**0.5
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    rows = softmax(query, key, value, local)
    far = softmax(full_query, global_key, global_value, same[:, None].expand_as(local))
    return torch.where(is_global[:, :, None, None], far, rows)


def test_layers_equal_dense_softmax():
    for case in LAYER_CASES:
        plain = LayerCase(**{**vars(case), "dropout": 0.0})
        torch.testing.assert_close(plain.truth()[0], dense_layer(plain), rtol=0, atol=1e-12)


def test_dropped_weights_vanish_and_the_rest_grow():
    case = LayerCase("all keys", 12, (12,), (12,), (1,), dropout=0.25)
    *inputs, _ = case.tensors()
    shard = case.shard()
    inputs[0] = torch.zeros_like(inputs[0])  # equal weights: each output is a mean of kept values
    eye = torch.eye(12, dtype=torch.float64)[None, :, None]
    dropout = reference.AttentionDropout(0.25, 99, shard.sample_ids)
    band = Band(case.spec, 0, (0, 12), dropout=dropout)
    query = key = torch.zeros(1, 12, 1, 12, dtype=torch.float64)
    weights = reference.window_attention(query, key, eye, None, None, band)[0][0, :, 0]
    kept = weights != 0
    assert 0 < int(kept.sum()) < 144
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 12 / 0.75))
