"""LED and the char LM on any layout, the same training, dropout and label smoothing on."""

import pytest

from dist import run_ranks
from task_layouts import CASES, Case, walk, write_data

REFERENCES = {kind: str(Case(kind, 1, 1, 1)) for kind in ("led", "char_lm")}


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_data(folder)
    seen = {}
    for world in (1, 2, 4):
        cases = [case for case in CASES if case.world == world]
        ranks = run_ranks(world, walk, cases, str(folder), timeout=200.0)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
        seen |= ranks[0]
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_norms_equal_one_rank(histories, case):
    expected, found = histories[REFERENCES[case.kind]], histories[str(case)]
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=1e-6), f"step {step}"


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_reference_learns_and_every_held_out_target_counts(histories, kind):
    *steps, (held_out, num_targets) = histories[REFERENCES[kind]]
    losses = [loss for loss, _ in steps]
    assert len(set(losses)) == len(losses) and losses[-1] < losses[0]
    assert all(norm > 0.05 for _, norm in steps)
    assert held_out < losses[0]
    if kind == "led":
        lengths = [1 + 9 * n % 19 for n in range(11)]
        assert num_targets == sum(min(length + 2, 15) for length in lengths)
    else:
        assert num_targets == sum(1 + 5 * n for n in range(11))  # every character, once
