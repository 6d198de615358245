"""LED and the char LM on any layout, the same training, dropout and label smoothing on."""

import pytest

from task_layouts import CASES, Case, histories

REFERENCES = {kind: str(Case(kind, 1, 1, 1)) for kind in ("led", "char_lm")}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return histories(CASES, tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_norms_equal_one_rank(seen, case):
    expected, found = seen[REFERENCES[case.kind]], seen[str(case)]
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=1e-6), f"step {step}"


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_reference_learns_and_every_held_out_target_counts(seen, kind):
    *steps, (held_out, num_targets) = seen[REFERENCES[kind]]
    losses = [loss for loss, _ in steps]
    assert len(set(losses)) == len(losses) and losses[-1] < losses[0]
    assert all(norm > 0.05 for _, norm in steps)
    assert held_out < losses[0]
    if kind == "led":
        lengths = [1 + 9 * n % 19 for n in range(11)]
        assert num_targets == sum(min(length + 2, 15) for length in lengths)
    else:
        assert num_targets == sum(1 + 5 * n for n in range(11))  # every character, once
