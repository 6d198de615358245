"""Dropout is a pure function of position: right rate, no pattern, the same for every layout."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from haloformer.kernels.dropout import (
    AttentionDropout,
    fold_key,
    hash_bases,
    keep_mask,
)
from haloformer.kernels.hidden_dropout import by_triton, hidden_dropout

IDS = torch.tensor([0, 1, 7, 2**40])


def mask(key, rate, rows=200, columns=300):
    bases = hash_bases(key, IDS, range(3))[:, :, None, None]
    return keep_mask(bases, torch.arange(rows)[:, None], torch.arange(columns), rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_rate_is_met_overall_and_in_every_row_and_column(rate):
    kept = mask(fold_key(3, 5, 1, 0), rate).double()
    # Six standard deviations: about one in 10**9 by chance.
    for mean, count in ((kept.mean(), kept.numel()), (kept.mean(2), 200), (kept.mean(3), 300)):
        slack = 6 * (rate * (1 - rate) / count) ** 0.5
        assert (mean - (1 - rate)).abs().max() <= slack


def test_neighbours_and_examples_and_heads_and_keys_are_independent():
    kept = mask(fold_key(3, 5, 1, 0), 0.5).double() - 0.5
    other = mask(fold_key(3, 6, 1, 0), 0.5).double() - 0.5
    pairs = {
        "columns": (kept[..., 1:], kept[..., :-1]),
        "rows": (kept[..., 1:, :], kept[..., :-1, :]),
        "diagonals": (kept[..., 1:, 1:], kept[..., :-1, :-1]),
        "heads": (kept[:, 1:], kept[:, :-1]),
        "examples": (kept[1:], kept[:-1]),
        "steps": (kept, other),
    }
    for name, (a, b) in pairs.items():
        correlation = 4 * (a * b).mean()
        assert abs(correlation) < 6 / a.numel() ** 0.5, name


def test_every_part_of_the_key_counts():
    keys = {fold_key(*parts) for parts in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))}
    keys |= {fold_key(0, 0, 0, 1), fold_key(2**32, 0, 0, 0), fold_key(0, 2**33, 0, 0)}
    assert len(keys) == 7 and all(0 <= key < 2**32 for key in keys)
    with pytest.raises(ValueError, match="step is -1"):
        fold_key(0, -1, 0, 0)


def test_the_mask_never_changes():
    """Checkpoints rely on it: a resumed run drops what the uninterrupted one would have."""
    assert fold_key(1, 2, 3, 4) == 1906014261
    bases = hash_bases(12345, IDS[2:], (0, 5))[..., None]
    kept = keep_mask(bases, torch.tensor(9), torch.arange(8), 0.5)
    assert kept.int().tolist() == [
        [[1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0]],
        [[0, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1, 1]],
    ]


def test_heads_by_number_are_rows_of_the_whole():
    whole = AttentionDropout(0.1, 77, IDS).bases(6)
    assert torch.equal(AttentionDropout(0.1, 77, IDS, heads=(4, 1)).bases(2), whole[:, [4, 1]])


def test_a_shard_of_hidden_states_drops_what_the_whole_would():
    x = torch.randn(4, 12, 5)
    whole = hidden_dropout(x, 0.4, 9, IDS)
    parts = [hidden_dropout(x[:, i : i + 4], 0.4, 9, IDS, first_row=i) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    scaled = x / 0.6
    assert ((whole == 0) | ((whole - scaled).abs() < 1e-6)).all() and (whole == 0).any()
    assert hidden_dropout(x, 0.0, 9, IDS) is x


def test_float64_on_a_gpu_is_not_rounded_by_the_kernel():
    with FakeTensorMode():  # of a GPU that need not be there
        of_gpu = {
            x: torch.empty(1, 2, 3, dtype=x, device="cuda") for x in (torch.half, torch.double)
        }
    assert by_triton(of_gpu[torch.half]) and not by_triton(of_gpu[torch.double])
    assert not by_triton(torch.empty(1, 2, 3))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_rates_outside_the_range_are_refused(rate):
    with pytest.raises(ValueError, match="outside"):
        AttentionDropout(rate, 1, IDS)


def test_rows_at_a_time_are_rows_at_once():
    bases = hash_bases(7, IDS, range(3))[:, :, None, None]
    rows, columns = torch.arange(50)[:, None], torch.arange(4000)  # several parts on a CPU
    whole = keep_mask(bases, rows, columns.expand(50, 4000), 0.3)  # other columns for every row
    assert torch.equal(keep_mask(bases, rows, columns, 0.3), whole)
    assert torch.equal(keep_mask(bases[0, 0, 0, 0], rows[3, 0], columns, 0.3), whole[0, 0, 3])
    for nothing in (
        keep_mask(bases, rows[:0], columns, 0.3),
        keep_mask(bases, rows, columns[:0], 0.3),
    ):
        assert nothing.numel() == 0 and nothing.shape[:2] == (4, 3)
