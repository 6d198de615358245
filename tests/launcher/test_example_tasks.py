"""Classification, questions, choices and coreference: alike on any layout."""

import pytest

from task_layouts import EXAMPLE_CASES, EXAMPLES, NUM_PAIRS, Case, histories


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return histories(EXAMPLE_CASES, tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("case", EXAMPLE_CASES, ids=str)
def test_losses_and_gradient_norms_equal_one_rank(seen, case):
    expected, found = seen[str(Case(case.kind, 1, 1, 1))], seen[str(case)]
    # bf16 has 8 bits, and with it coreference may keep other spans: it follows, it is not equal.
    tolerance = 1e-6 if case.precision == "fp32" else 0.03
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=tolerance), f"step {step}"


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_reference_trains_and_the_held_out_loss_is_a_mean_over_its_examples(seen, kind):
    *steps, (held_out, num_targets) = seen[str(Case(kind, 1, 1, 1))]
    assert len({loss for loss, _ in steps}) == len(steps)
    assert all(norm > 1e-3 for _, norm in steps)
    assert 0 < held_out < float("inf")
    # Of the questions, those of more than 40 letters lost their answer with their end.
    assert num_targets == (8 if kind == "longformer_qa" else NUM_PAIRS)
