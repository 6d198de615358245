"""Where a tensor rank's elements are in the whole, on matrices small enough to write out."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from haloformer.launcher.splits import Picked, Saved, Share, group_blocks, share_of

WHOLE = torch.arange(24).view(4, 6)


def share(shape, rank, ranks, dim, **marks):
    parameter = nn.Parameter(torch.zeros(shape))
    if dim is not None:
        parameter.tensor_model_parallel, parameter.partition_dim = True, dim
    for name, value in marks.items():
        setattr(parameter, name, value)
    topology = SimpleNamespace(tensor_rank=rank, layout=SimpleNamespace(tensor=ranks))
    return share_of(parameter, topology)


def test_a_split_by_output_is_a_run_of_the_whole():
    lower = share((2, 6), 1, 2, 0)
    data, start = lower.place(WHOLE[2:].flatten()[3:], 3)
    assert start == 15 and data.tolist() == list(range(15, 24))
    assert lower.key("w") == "w" and lower.numel == 24
    assert lower.keys("w") == ["w"]


def test_a_split_by_input_is_a_block_of_columns_with_a_name_of_its_own():
    right = share((4, 3), 1, 2, 1)
    assert right.key("w") == "w[:,3:6]" and right.numel == 12
    assert right.keys("w") == ["w[:,0:3]", "w[:,3:6]"]
    assert right.place(torch.zeros(5), 7)[1] == 7


def test_what_is_not_split_is_whole():
    assert share((4, 6), 1, 2, None) == Share(4, 6, range(6))
    assert share((5,), 1, 2, None) == Share(5, 1, range(1))
    assert share((), 1, 2, None) == Share(1, 1, range(1))


def test_rows_that_pad_the_vocabulary_are_left_out():
    # 5 tokens on 2 ranks: the second has rows 3, 4 and one of padding.
    last = share((3, 2), 1, 2, 0, unpadded_rows=5)
    data, start = last.place(torch.arange(6), 0)
    assert (len(data), start, last.numel) == (4, 6, 10)
    data, start = last.place(torch.arange(2), 4)  # ZeRO gave this rank padding only
    assert (len(data), start) == (0, 10)


def test_an_empty_placeholder_of_zero_3_has_its_real_shape():
    assert share((0,), 1, 2, 1, ds_shape=torch.Size((4, 3))).key("w") == "w[:,3:6]"


@pytest.mark.parametrize("cuts", [(0, 6), (0, 3, 6), (0, 1, 5, 6), (0, 1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("columns", [range(6), range(3), range(3, 6), range(2, 4)])
def test_any_run_of_any_columns_is_picked_from_any_blocks(cuts, columns):
    blocks = [range(a, b) for a, b in pairwise(cuts)]
    wanted = WHOLE[:, columns.start : columns.stop].flatten()
    for start in range(len(wanted)):
        for stop in range(start + 1, len(wanted) + 1):
            data = torch.zeros(stop - start, dtype=torch.int64)
            picked = Picked.plan(data, start, columns, blocks)
            assert all(set(block) & set(columns) for block in picked.parts)
            for block, part in picked.parts.items():
                rows = WHOLE[picked.rows.start : picked.rows.stop]
                part.copy_(rows[:, block.start : block.stop].flatten())
            picked.fill()
            assert torch.equal(data, wanted[start:stop])


def test_only_the_rows_of_the_run_are_read():
    picked = Picked.plan(torch.zeros(2), 7, range(6), [range(3), range(3, 6)])
    assert picked.rows == range(1, 2)
    assert {block: len(part) for block, part in picked.parts.items()} == {
        range(3): 3,
        range(3, 6): 3,
    }


def test_stored_names_are_grouped_by_parameter():
    grouped = group_blocks({"w[:,3:6]": 12, "w[:,0:3]": 12, "b": 6, "odd[:,x:y]": 1})
    assert grouped["w"].blocks(6) == [range(3), range(3, 6)]
    assert grouped["b"].blocks(6) == [range(6)]
    assert grouped.keys() == {"w", "b", "odd[:,x:y]"}
    assert grouped["w"].fault(Share(4, 6, range(6))) is None


@pytest.mark.parametrize(
    ("numels", "fault"),
    [
        ({}, "nothing elements saved, 24 wanted"),
        ({range(3): 12}, "12 elements saved, 24 wanted"),
        ({range(3): 12, range(2, 5): 12}, "the saved columns 2:5 do not continue 3"),
        ({range(3): 11, range(3, 6): 13}, "the saved columns 0:3 do not continue 0"),
        ({range(3): 12, range(4, 7): 12}, "the saved columns 4:7 do not continue 3"),
        ({range(6): 24, range(6, 6): 0}, "the saved columns 6:6 do not continue 6"),
        ({None: 12, range(3): 12}, "the saved columns 0:6 do not continue 0"),
    ],
)
def test_blocks_that_do_not_make_up_the_parameter_are_refused(numels, fault):
    assert Saved(numels).fault(Share(4, 6, range(6))) == fault


def test_a_parameter_that_is_not_wanted_is_a_fault():
    assert Saved({None: 3}).fault(None) == "3 elements saved, none wanted"
