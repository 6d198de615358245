"""Phases: one recipe each, and every fault by the key that the user wrote."""

from pathlib import Path

import pytest
import yaml

from haloformer.configs.load import RECIPES, ConfigError, check_world, load_config, parse_config

PHASES = [
    {"steps": 2, "seq_len": 512, "attention_window": 32, "warmup_steps": 1},
    {"steps": 3, "name": "wide", "learning_rate": 5e-4, "schedule": "constant"},
    {"steps": 4, "global_batch": 6, "micro_batch": 3, "dilation": [1, 1, 2, 4]},
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The shipped MLM recipe with the phases above, and without steps."""
    raw = yaml.safe_load((RECIPES / "enwiki_mlm.yaml").read_text())
    del raw["steps"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw, "phases": PHASES}))
    return path


def test_a_phase_is_the_recipe_with_its_own_keys(recipe: Path) -> None:
    config = load_config(recipe)
    plain = load_config("enwiki_mlm").model_dump()
    first, wide, last = config.all_phases()
    assert config.steps == 9
    assert [phase.name for phase in (first, wide, last)] == ["phase-0", "wide", "phase-2"]
    assert [(phase.first_step, phase.end_step) for phase in (first, wide, last)] == [
        (0, 2),
        (2, 5),
        (5, 9),
    ]
    plain["steps"] = 2
    plain["data"]["seq_len"], plain["model"]["attention_window"] = 512, 32
    plain["optim"]["warmup_steps"] = 1
    assert first.config.model_dump() == plain
    assert wide.config.optim.learning_rate == 5e-4 and wide.config.optim.schedule == "constant"
    assert wide.config.data.seq_len == config.data.seq_len
    assert (last.config.batch.global_batch, last.config.batch.micro_batch) == (6, 3)
    assert last.config.model.dilation == [1, 1, 2, 4]


def test_every_step_has_its_phase(recipe: Path) -> None:
    config = load_config(recipe)
    numbers = [config.phase_at(step).number for step in range(10)]
    assert numbers == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]  # behind the end it is the last


def test_a_recipe_without_phases_is_one_phase() -> None:
    config = load_config("enwiki_mlm")
    phase = config.phase_at(7)
    assert (phase.number, phase.name, phase.first_step) == (0, config.name, 0)
    assert phase.config is config and phase.end_step == config.steps


def test_phases_survive_json(recipe: Path) -> None:
    config = load_config(recipe)
    assert parse_config(config.model_dump(mode="json"), "plan") == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=10", r"steps 10 is not what the phases take, 2 \+ 3 \+ 4 = 9; leave steps out"),
        ("phases.1.steps=0", r"phases\[1\].steps: .* greater than or equal to 1"),
        ("phases.0.seq_len=4", r"phases\[0\].seq_len: .* 8"),
        ("phases.1.steps=null", r"phases\[1\].steps: "),
        ("phases.1.setps=3", r"phases\[1\].setps: unknown key .steps\?"),
        ("phases.0.attention_window=33", r"phases\[0\].attention_window 33 is odd"),
        ("phases.2.attention_window=[2]", r"phases\[2\].attention_window has 1 entries for 4 la"),
        ("phases.2.dilation=[2]", r"phases\[2\].dilation has 1 entries for 4 heads"),
        ("phases.3.steps=4", "phases.3.steps=4': 3 is no entry of a list of 3"),
        ("phases.0.steps.x=4", "steps is a value, not a section"),
        ("phases=[3]", r"phases\[0\]: .*PhaseConfig"),
    ],
)
def test_a_phase_that_cannot_be_trained_is_named(recipe: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(recipe, [override])
    assert "missing key" not in str(caught.value)


def test_phases_of_a_model_without_dilation_have_none() -> None:
    phases = "phases=[{steps: 1, dilation: 2}, {steps: 199, dilation: 3}]"
    with pytest.raises(ConfigError) as caught:
        load_config("wiki_led", [phases])
    for number in (0, 1):
        assert f"phases[{number}].dilation: a led has none; remove it" in str(caught.value)


def test_every_phase_must_fit_the_ranks_and_the_positions(recipe: Path) -> None:
    assert check_world(load_config(recipe, ["phases.2.micro_batch=1"]), 2) == 1
    with pytest.raises(ConfigError) as caught:
        changed = ["phases.0.seq_len=4098", "phases.2.micro_batch=1", "parallel.context=1"]
        check_world(load_config(recipe, [*changed, "batch.global_batch=5"]), 4)
    message = str(caught.value)
    for part in (
        "phases[0].seq_len 4098 (padded to 4098 for 1 context ranks) is more than",
        "phases[2].global_batch 6 is not a multiple of phases[2].micro_batch 1 x 4 data-parallel",
    ):
        assert part in message
    # What two phases take from the recipe is told once.
    assert message.count("batch.global_batch 5 is not a multiple of batch.micro_batch 1 x 4") == 1
