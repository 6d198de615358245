"""What a continuation may change: nothing that has been trained, anything that has not."""

import pytest

from haloformer.configs.load import parse_config
from haloformer.launcher.cli import build_parser, parse
from haloformer.launcher.resume import _check_same, more_steps
from launcher_runs import TINY

PHASES = [{"steps": 8, "seq_len": 64}, {"steps": 8}, {"steps": 8, "learning_rate": 1e-3}]


def recipe(phases=PHASES, **changes):
    raw = {key: value for key, value in TINY.items() if key != "steps"}
    return parse_config({**raw, "phases": phases, **changes}, "recipe")


def changed(number: int, **keys) -> list[dict]:
    return [{**phase, **keys} if n == number else phase for n, phase in enumerate(PHASES)]


@pytest.mark.parametrize(
    "phases",
    [
        changed(2, learning_rate=2e-3, seq_len=32, global_batch=8),  # not begun
        changed(1, steps=9),  # longer than it was
        changed(1, steps=4),  # ends here
        changed(0, micro_batch=2),  # computes the same
        changed(0, name="first"),
        PHASES[:2],
        [*PHASES, {"steps": 3}],
    ],
)
def test_what_has_not_begun_may_change(phases) -> None:
    _check_same(recipe(phases), recipe(), 12, "run")


@pytest.mark.parametrize(
    ("phases", "named"),
    [
        (changed(0, seq_len=32), r"phases\[0\].seq_len was 64, is 32"),
        (changed(1, learning_rate=2e-3), r"phases\[1\].learning_rate was 0.003, is 0.002"),
        (changed(0, steps=9), r"phases\[0\].steps was 8, is 9"),
        (changed(1, steps=3), r"phases\[1\].steps is 3, and 4 are trained"),
        (PHASES[:1], r"phases\[1\] has begun and is not there any more"),
    ],
)
def test_what_has_begun_stays(phases, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _check_same(recipe(phases), recipe(), 12, "run")


def test_what_is_common_to_all_phases_is_told_once() -> None:
    with pytest.raises(ValueError, match="seed was 3, is 4; set the old values"):
        _check_same(recipe(seed=4), recipe(), 24, "run")


def test_a_checkpoint_at_a_border_leaves_the_next_phase_free() -> None:
    _check_same(recipe(changed(1, seq_len=32, global_batch=2)), recipe(), 8, "run")


def test_a_run_without_phases_may_get_some_and_one_phase_may_become_none() -> None:
    plain = parse_config(TINY, "recipe")
    _check_same(recipe([{"steps": 24}, {"steps": 8, "seq_len": 64}]), plain, 24, "run")
    _check_same(plain, recipe([{"steps": 12}]), 12, "run")
    with pytest.raises(ValueError, match=r"phases\[0\].steps is 8, and 9 are trained"):
        _check_same(recipe([{"steps": 8}, {"steps": 16}]), plain, 9, "run")


def test_how_to_take_more_steps_is_said_in_the_recipes_own_words() -> None:
    assert more_steps(parse_config(TINY, "recipe"), 24) == "steps=48"
    assert more_steps(recipe(), 24) == "phases.2.steps=32"


def test_overrides_may_stand_before_and_behind_options(capsys) -> None:
    words = ["train", "tiny", "seed=1", "--ranks", "2", "steps=9", "--supervise", "name=x"]
    arguments = parse(build_parser("train"), words)
    assert (arguments.config, arguments.ranks, arguments.supervise) == ("tiny", 2, True)
    assert arguments.overrides == ["seed=1", "steps=9", "name=x"]
    for stranger in ("--nodes=2", "steps"):
        with pytest.raises(SystemExit):
            parse(build_parser("train"), ["train", "tiny", "--ranks", "2", stranger])
        assert f"unrecognized arguments: {stranger}" in capsys.readouterr().err
