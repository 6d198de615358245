"""The public op: every backend gives the same, every refusal says why in one line."""

import logging

import pytest
import torch

from haloformer.kernels import dispatch
from haloformer.kernels.dispatch import sliding_window_attention
from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.spec import WindowSpec

SPEC = WindowSpec((3, 2), (3, 0), (1, 2))


def operands(**changes):
    generator = torch.Generator().manual_seed(0)

    def draw(rows):
        return torch.randn(2, rows, 2, 4, dtype=torch.float64, generator=generator)

    found = {"query": draw(11), "key": draw(11), "value": draw(11), "spec": SPEC}
    return {**found, **changes}


def full_operands():
    ids = torch.tensor([3, 8])
    columns = torch.tensor([[4, 0], [1, 2]])
    return operands(
        key_mask=torch.arange(22).view(2, 11) % 5 != 0,
        segment_ids=torch.arange(11).expand(2, 11) // 6,
        global_key=torch.ones(2, 2, 2, 4, dtype=torch.float64),
        global_value=torch.full((2, 2, 2, 4), 3.0, dtype=torch.float64),
        global_key_mask=torch.tensor([[True, False], [True, True]]),
        global_segment_ids=torch.tensor([[0, 0], [1, 0]]),
        dropout=AttentionDropout(0.3, 5, ids, global_columns=columns),
    )


@pytest.mark.parametrize("make", [operands, full_operands])
def test_auto_and_chunks_and_loop_agree(make):
    outs = [sliding_window_attention(**make(), backend=b) for b in ("loop", "chunks", "auto")]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-12)


def test_global_keys_are_seen_across_segments_unless_they_have_one():
    changes = {
        "segment_ids": torch.arange(11).expand(2, 11) // 6,
        "global_key": torch.full((2, 1, 2, 4), 1e3, dtype=torch.float64),
        "global_value": torch.full((2, 1, 2, 4), 9.0, dtype=torch.float64),
        "query": torch.ones(2, 11, 2, 4, dtype=torch.float64),
    }
    out = sliding_window_attention(**operands(**changes))
    torch.testing.assert_close(out, torch.full_like(out, 9.0))
    owned = sliding_window_attention(
        **operands(**changes), global_segment_ids=torch.zeros(2, 1, dtype=torch.int64)
    )
    torch.testing.assert_close(owned[:, :6], out[:, :6])
    assert (owned[:, 6:] - 9.0).abs().min() > 1.0


def test_auto_logs_its_choice_once(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            sliding_window_attention(**operands())
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend: chunks (not triton: the tensors are on cpu)"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": torch.ones(2, 11, 8)},
            r"query has shape \(2, 11, 8\); it must be \[B, N, H, D\]",
        ),
        ({"query": torch.ones(2, 0, 2, 4)}, "no size may be 0"),
        ({"query": torch.ones(2, 11, 2, 4, dtype=torch.int64)}, "query is torch.int64"),
        ({"key": torch.ones(2, 10, 2, 4)}, r"key has shape \(2, 10, 2, 4\)"),
        ({"value": torch.ones(2, 11, 2, 4)}, "value is torch.float32 and query is torch.float64"),
        ({"spec": WindowSpec((1,), (1,), (1,))}, "the window spec is for 1 heads, query has 2"),
        ({"key_mask": torch.ones(2, 11)}, "key_mask is torch.float32; masks are bool"),
        ({"key_mask": torch.ones(11, dtype=torch.bool)}, r"key_mask has shape \(11,\)"),
        ({"segment_ids": torch.ones(2, 11)}, "segment ids are integers"),
        ({"global_key": torch.ones(2, 1, 2, 4)}, "give both or neither"),
        ({"global_segment_ids": torch.ones(2, 0, dtype=torch.int64)}, "without segment_ids"),
        ({"dropout": AttentionDropout(0.1, 1, torch.arange(3))}, "dropout.sample_ids has shape"),
        (
            {"dropout": AttentionDropout(0.1, 1, torch.arange(2), heads=(0,))},
            "dropout.heads names 1 heads, query has 2",
        ),
        ({"backend": "flash"}, "backend 'flash' is not one of auto, chunks, triton, loop"),
        ({"backend": "triton"}, "backend 'triton' cannot run: "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        sliding_window_attention(**operands(**changes))
    assert "\n" not in str(caught.value)


def test_dropout_must_know_where_the_global_keys_stand():
    changes = full_operands()
    changes["dropout"] = AttentionDropout(0.3, 5, torch.tensor([3, 8]))
    with pytest.raises(ValueError, match="global_columns is None"):
        sliding_window_attention(**changes)


def test_the_reference_refuses_what_would_take_for_ever():
    long = torch.zeros(1, 5000, 2, 4)
    with pytest.raises(ValueError, match="5000 rows are above 4096"):
        sliding_window_attention(long, long, long, SPEC, backend="loop")
