"""LED on any layout, the same training: losses and gradient norms, dropout and smoothing on."""

import pytest

from dist import run_ranks
from led_layouts import CASES, Case, walk, write_pairs

REFERENCE = Case(1, 1, 1)


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("led") / "pairs"
    write_pairs(folder)
    seen = {}
    for world in (1, 2):
        cases = [case for case in CASES if case.world == world]
        ranks = run_ranks(world, walk, cases, str(folder), timeout=200.0)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
        seen |= ranks[0]
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_norms_equal_one_rank(histories, case):
    expected, found = histories[str(REFERENCE)], histories[str(case)]
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=1e-6), f"step {step}"


def test_the_reference_learns_and_every_held_out_pair_counts(histories):
    *steps, (held_out, num_targets) = histories[str(REFERENCE)]
    losses = [loss for loss, _ in steps]
    assert len(set(losses)) == len(losses) and losses[-1] < losses[0]
    assert all(norm > 0.05 for _, norm in steps)
    assert held_out < losses[0]
    lengths = [1 + 9 * n % 19 for n in range(11)]
    assert num_targets == sum(min(length + 2, 15) for length in lengths)
