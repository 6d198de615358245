"""Phases on any layout: the same training, resumed from anywhere; nothing is lost at a border."""

import pytest

from dist import run_ranks
from phase_layouts import CASES, STEPS, Case, resumes, walk
from task_layouts import write_data

ENDS = (2, 4, 6)  # of the phases
REFERENCES = {case.kind: str(case) for case in reversed(CASES)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    write_data(folder)
    found = {}
    for world in (1, 2):  # one rank writes what two read
        cases = [case for case in CASES if case.world == world]
        ranks = run_ranks(world, walk, cases, str(folder), timeout=600.0)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
        found |= ranks[0]
    return found


def entries_from(step):
    """Where a history resumed at a step begins: a held-out entry follows each phase."""
    return step + sum(end <= step for end in ENDS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_norms_and_held_out_losses_equal_one_rank(case: Case, seen) -> None:
    expected, found = seen[REFERENCES[case.kind]][0], seen[str(case)][0]
    assert len(expected) == STEPS + len(ENDS)
    for place, (want, have) in enumerate(zip(expected, found, strict=True)):
        assert have == pytest.approx(want, rel=1e-6), f"entry {place}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_inside_each_phase_and_at_each_border_is_exact(case: Case, seen) -> None:
    whole, resumed, _ = seen[str(case)]
    assert tuple(resumed) == resumes(case)
    for step, history in resumed.items():
        assert history == whole[entries_from(step) :], f"from step {step}"


@pytest.mark.parametrize("case", [c for c in CASES if str(c) not in REFERENCES.values()], ids=str)
def test_resume_from_other_ranks_gives_their_losses(case: Case, seen) -> None:
    expected, (_, _, elastic) = seen[REFERENCES[case.kind]][0], seen[str(case)]
    assert list(elastic) == [3]
    for step, history in elastic.items():
        rest = expected[entries_from(step) :]
        for place, (want, have) in enumerate(zip(rest, history, strict=True)):
            assert have == pytest.approx(want, rel=1e-6), f"from step {step}, entry {place}"


@pytest.mark.parametrize("kind", REFERENCES)
def test_every_step_has_the_batch_and_length_of_its_phase(kind: str, seen) -> None:
    steps = [entry for entry in seen[REFERENCES[kind]][0] if len(entry) == 3]
    losses, norms, num_tokens = zip(*steps, strict=True)
    assert len(set(losses)) == STEPS and min(norms) > 0.05
    if kind != "led":  # whose sources are as long as they are
        assert num_tokens == (8 * 24,) * 2 + (4 * 47,) * 4
