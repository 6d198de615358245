"""Classification, questions, choices and coreference: alike on any layout."""

import pytest

from dist import run_ranks
from task_layouts import EXAMPLE_CASES, EXAMPLES, NUM_PAIRS, Case, walk, write_data


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    write_data(folder)
    seen = {}
    for world in (1, 2):
        cases = [case for case in EXAMPLE_CASES if case.world == world]
        ranks = run_ranks(world, walk, cases, str(folder), timeout=300.0)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
        seen |= ranks[0]
    return seen


@pytest.mark.parametrize("case", EXAMPLE_CASES, ids=str)
def test_losses_and_gradient_norms_equal_one_rank(histories, case):
    expected, found = histories[str(Case(case.kind, 1, 1, 1))], histories[str(case)]
    # bf16 has 8 bits, and with it coreference may keep other spans: it follows, it is not equal.
    tolerance = 1e-6 if case.precision == "fp32" else 0.03
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=tolerance), f"step {step}"


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_reference_trains_and_the_held_out_loss_is_a_mean_over_its_examples(histories, kind):
    *steps, (held_out, num_targets) = histories[str(Case(kind, 1, 1, 1))]
    assert len({loss for loss, _ in steps}) == len(steps)
    assert all(norm > 1e-3 for _, norm in steps)
    assert 0 < held_out < float("inf")
    # Of the questions, those of more than 40 letters lost their answer with their end.
    assert num_targets == (8 if kind == "longformer_qa" else NUM_PAIRS)
