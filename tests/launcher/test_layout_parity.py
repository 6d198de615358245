"""Any layout, the same training: losses and gradient norms of the real model, dropout on."""

import pytest

from dist import run_ranks
from longformer_layouts import CASES, Case, walk

REFERENCE = Case(1, 1, 0, 4)


@pytest.fixture(scope="module")
def histories():
    seen = {}
    for world in (1, 2, 4):
        cases = [case for case in CASES if case.world == world]
        ranks = run_ranks(world, walk, cases, timeout=400.0)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
        seen |= ranks[0]
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_norms_equal_one_rank(histories, case):
    expected, found = histories[str(REFERENCE)], histories[str(case)]
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=1e-6), f"step {step}"


def test_the_reference_depends_on_every_step(histories):
    losses = [loss for loss, _ in histories[str(REFERENCE)]]
    assert len(set(losses)) == len(losses)
    assert all(norm > 0.05 for _, norm in histories[str(REFERENCE)])
