"""A recipe on top of another one."""

from pathlib import Path

import pytest

from haloformer.configs.load import ConfigError, load_config


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_a_recipe_says_only_what_its_base_does_not(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "mine",
        "base: enwiki_mlm\nname: mine\nmodel: {num_layers: 2, attention_window: [32, 64]}\n",
    )
    base, config = load_config("enwiki_mlm"), load_config(path, ["model.num_heads=8"])
    assert (config.name, config.steps, config.optim) == ("mine", base.steps, base.optim)
    changed = {"num_layers": 2, "attention_window": [32, 64], "num_heads": 8}
    assert config.model == base.model.model_copy(update=changed)


def test_a_base_lies_beside_the_recipe_and_may_have_one_itself(tmp_path: Path) -> None:
    write(tmp_path, "bottom", "base: enwiki_mlm\nsteps: 7\nseed: 5\n")
    write(tmp_path, "middle", "base: bottom.yaml\nseed: 6\n")
    config = load_config(write(tmp_path, "top", "base: middle.yaml\nname: top\n"))
    assert (config.name, config.seed, config.steps) == ("top", 6, 7)


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("mine.yaml", "cannot be its own base"),
        ("other.yaml", "cannot be its own base"),
        ("nothing", "nothing: no such recipe file; shipped recipes are: "),
        ("[1]", "base \\[1\\] is no name of a recipe"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, base: str, named: str) -> None:
    write(tmp_path, "other", "base: mine.yaml\n")
    with pytest.raises(ConfigError, match=named):
        load_config(write(tmp_path, "mine", f"base: {base}\n"))
