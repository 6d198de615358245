"""Overlapping windows that reuse what was computed give what whole windows give."""

import math
import random
from itertools import pairwise

import pytest
import torch

from haloformer.configs.schema import CharLmConfig
from haloformer.model.char_lm import CharLm, rotate
from haloformer.model.streaming import StreamingCharLm, StreamRows, losses_of_whole_windows
from haloformer.model.streaming_plan import StreamingPlan, Windows
from haloformer.model.windows import char_window

VOCAB = 17


def char_lm(windows, dilation, dtype=torch.float64):
    config = CharLmConfig(
        hidden_size=16,
        num_layers=len(windows),
        num_heads=4,
        ffn_size=24,
        max_positions=64,
        attention_window=windows,
        dilation=dilation,
        initializer_range=0.4,
    )
    torch.manual_seed(5)
    model = CharLm(config, VOCAB).to(dtype).eval()
    return model, [char_window(config, layer).reach_left for layer in range(len(windows))]


def stream(num_rows, isolated=False):
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    labels = labels.masked_fill(labels == 3, -100)  # a special, say
    segments = torch.arange(num_rows) // 11 if isolated else None

    def read(first, stop):
        assert 0 <= first < stop <= num_rows
        part = None if segments is None else segments[first:stop]
        return StreamRows(ids[first:stop], labels[first:stop], part)

    return read


def total(parts):
    parts = list(parts)
    return math.fsum(p.loss_sum for p in parts), sum(p.num_targets for p in parts)


# (two-sided windows, dilation of two heads, rows, length, stride): what is reached against what
# stays of a window, 12 < 16, 12 = 12, 14 > 8 and far beyond; a window longer than the stream.
CASES = {
    "once": ([4, 8, 4], [1, 2, 1], 90, 20, 4),
    "just_once": ([4, 8, 4], [1, 2, 1], 90, 16, 4),
    "again": ([4, 8, 4], [1, 2, 2], 90, 12, 4),
    "all_again": ([16, 24, 16], [1, 1, 2], 70, 10, 3),
    "one_layer": ([8], [1], 50, 6, 2),
    "no_overlap": ([4, 4], [1, 2], 61, 12, 12),
    "row_by_row": ([4, 6], [1, 2], 40, 9, 1),
    "one_window": ([4, 8], [1, 2], 30, 64, 8),
    "one_row": ([4, 8], [1, 2], 1, 64, 8),
}


@pytest.mark.parametrize("isolated", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("case", CASES)
def test_any_stretches_and_blocks_give_the_losses_of_whole_windows(case, isolated):
    sizes, dilation, num_rows, length, stride = CASES[case]
    model, reaches = char_lm(sizes, dilation)
    windows, read = Windows(num_rows, length, stride), stream(num_rows, isolated)
    whole = losses_of_whole_windows(model, windows, read)
    assert sum(part.num_targets for part in whole) == int((read(0, num_rows).labels >= 0).sum())
    for block_rows in (5, 1000):
        plan = StreamingPlan(windows, reaches, block_rows)
        scorer = StreamingCharLm(model, plan, read)
        for num_parts in (1, 3):
            cuts = [windows.count * part // num_parts for part in range(num_parts + 1)]
            for first, stop in pairwise(cuts):
                found = total(scorer.score(range(first, stop)))
                assert found == pytest.approx(total(whole[first:stop]), rel=1e-12)


def test_any_windows_at_all_give_the_losses_of_whole_windows():
    chance = random.Random(3)
    for _ in range(25):
        layers = chance.randint(1, 4)
        sizes = [2 * chance.randint(1, 9) for _ in range(layers)]
        model, reaches = char_lm(sizes, [chance.randint(1, 3) for _ in range(layers)])
        num_rows, length = chance.randint(1, 60), chance.randint(1, 40)
        windows = Windows(num_rows, length, chance.randint(1, length))
        read = stream(num_rows)
        scorer = StreamingCharLm(
            model, StreamingPlan(windows, reaches, chance.randint(1, 30)), read
        )
        first = chance.randrange(windows.count)
        found = total(scorer.score(range(first, windows.count)))
        whole = losses_of_whole_windows(model, windows, read)[first:]
        assert found == pytest.approx(total(whole), rel=1e-11), (sizes, windows)


def test_a_context_that_reaches_less_far_than_it_is_kept_is_computed_once():
    _, reaches = char_lm([4, 8, 4], [1, 2, 1])
    windows = Windows(200, 20, 2)
    plan = StreamingPlan(windows, reaches, 7)
    turns = list(plan.turns(range(windows.count)))
    assert sum(turn.num_computed for turn in turns) == 200 * 3
    assert windows.num_visited(range(windows.count)) == 91 * 20
    # A stretch in the middle begins with what its first rows depend on, and no more.
    middle = list(plan.turns(range(40, 50)))
    assert reaches == [2, 8, 2]
    assert sum(turn.num_scored for turn in middle) == 10 * 2
    # 8 + 2 rows of the first layer and 2 of the second are what the last layer reaches.
    assert sum(turn.num_computed for turn in middle) == 3 * 10 * 2 + 10 + 2


def test_a_context_that_reaches_further_is_computed_again_as_drawn():
    plan = StreamingPlan(Windows(100, 8, 2), [2, 1, 4], 100)
    turn = list(plan.turns(range(3, 6)))[1]
    start = turn.start
    assert (turn.first - start, turn.end - start) == (6, 8)
    dirty = [[row - start for row in rows] for rows in turn.dirty]
    assert dirty == [[], [1], [2], []]
    assert turn.num_computed == 3 * 2 + 2


def test_scores_of_fp32_far_along_the_stream_are_those_of_its_beginning():
    """Rotation by a position of millions: the product tells the distance to fp32 rounding."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 64, 2, 32, generator=generator) for _ in range(2))
    near, far = (
        torch.einsum("bnhd,bmhd->bhnm", rotate(query, first), rotate(key, first))
        for first in (0, 90_000_000)
    )
    exact = torch.einsum("bnhd,bmhd->bhnm", rotate(query.double(), 0), rotate(key.double(), 0))
    assert float((near - exact).abs().max()) < 2e-5
    assert float((far - exact).abs().max()) < 2e-5


def test_fp32_is_as_near_to_the_truth_with_reuse_as_without():
    sizes, dilation, num_rows, length, stride = CASES["again"]
    exact, reaches = char_lm(sizes, dilation)
    model, _ = char_lm(sizes, dilation, torch.float32)
    windows, read = Windows(num_rows, length, stride), stream(num_rows)
    truth = total(losses_of_whole_windows(exact, windows, read))[0]
    found = total(
        StreamingCharLm(model, StreamingPlan(windows, reaches, 64), read).score(
            range(windows.count)
        )
    )[0]
    whole = total(losses_of_whole_windows(model, windows, read))[0]
    assert abs(found - truth) < 3 * abs(whole - truth) + 1e-6 * truth


def test_windows_that_pass_over_rows_are_refused():
    with pytest.raises(ValueError, match="stride 9 passes over rows"):
        Windows(100, 8, 9)
