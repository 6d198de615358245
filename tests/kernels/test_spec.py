"""Windows: what may be said, and how heads group."""

import pytest

from haloformer.kernels.spec import WindowSpec


def test_a_two_sided_window_is_half_on_each_side():
    spec = WindowSpec.from_two_sided(8, 3, dilation=(1, 2, 1))
    assert (spec.left, spec.right, spec.dilation) == ((4,) * 3, (4,) * 3, (1, 2, 1))
    assert WindowSpec.from_two_sided(8, 2, causal=True).right == (0, 0)
    assert (spec.reach_left, spec.reach_right) == (8, 8)


def test_heads_group_by_halo_and_by_window():
    spec = WindowSpec((4, 2, 4, 2), (4, 2, 4, 2), (1, 2, 1, 1))
    assert spec.groups_by_reach() == [(0, 1, 2), (3,)]
    assert spec.groups_by_window() == [(0, 2), (1,), (3,)]
    assert spec.select((3, 1)) == WindowSpec((2, 2), (2, 2), (1, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowSpec.from_two_sided(7, 2), "window 7 is not an even number"),
        (lambda: WindowSpec.from_two_sided(0, 2), "window 0 is not an even number"),
        (lambda: WindowSpec.from_two_sided(4, 2, dilation=(1,)), "1 dilations for 2 heads"),
        (lambda: WindowSpec((1,), (1, 1), (1,)), "give one per head"),
        (lambda: WindowSpec((), (), ()), "give one per head"),
        (lambda: WindowSpec((-1,), (1,), (1,)), r"left\[0\] is -1; it must be at least 0"),
        (lambda: WindowSpec((1, 1), (1, 1), (1, 0)), r"dilation\[1\] is 0; it must be at least 1"),
    ],
)
def test_bad_windows_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
