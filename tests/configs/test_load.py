"""Recipes: all faults at once, by name, with the remedy."""

from pathlib import Path

import pytest
import yaml

from haloformer.configs.load import RECIPES, ConfigError, check_world, config_hash, load_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "enwiki_mlm.yaml").read_text())
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_fit_the_ranks_they_need(path: Path) -> None:
    config = load_config(path.stem)
    assert check_world(config, config.parallel.context) == 1


def test_overrides_replace_values_and_read_numbers_as_people_write_them(recipe: Path) -> None:
    config = load_config(
        recipe,
        ["optim.learning_rate=1e-4", "model.attention_window=[8, 16, 32, 64]", "name=other"],
    )
    assert config.optim.learning_rate == 1e-4
    assert config.model.window_of_layer(3) == 64
    assert config.name == "other"


def test_all_faults_are_reported_at_once(recipe: Path) -> None:
    raw = yaml.safe_load(recipe.read_text())
    del raw["data"]["train"]
    raw["setps"] = 3
    raw["model"]["hidden_sizes"] = 3
    raw["batch"]["global_batch"] = 0
    recipe.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    message = str(caught.value)
    for part in (
        str(recipe),
        "data.train: missing key",
        "setps: unknown key (steps?)",
        "model.hidden_sizes: unknown key (hidden_size?)",
        "batch.global_batch: Input should be greater than or equal to 1 (got 0)",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.attention_window=255", "attention_window 255 is odd"),
        ("model.attention_window=[64, 64]", "attention_window has 2 entries for 4 layers"),
        ("model.num_heads=3", "num_heads 3 does not divide hidden_size 256"),
        ("model.dilation=[1, 2]", "dilation has 2 entries for 4 heads"),
        ("parallel.zero_stage=4", "parallel.zero_stage"),
        ("parallel.tensor=0", "parallel.tensor"),
        ("seed=-1", "seed"),
        ("name=../x", "name"),
    ],
)
def test_a_bad_value_is_named(recipe: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("[", r"\[")):
        load_config(recipe, [override])


def test_bf16_without_master_weights_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="set zero_stage 1"):
        load_config(recipe, ["parallel.precision=bf16", "parallel.zero_stage=0"])


@pytest.mark.parametrize(
    ("overrides", "world", "named"),
    [
        ([], 3, r"--ranks 3 is not a multiple .* use --ranks 2"),
        (["batch.global_batch=3"], 4, r"global_batch 3 is not a multiple of .* = 2"),
        (["data.seq_len=16", "parallel.context=17"], 17, r"context 17 is more than data.seq_len"),
        (["data.seq_len=4098"], 2, r"max_positions 4096; lower data.seq_len"),
        (["parallel.tensor=2"], 2, r"context 2 x parallel.tensor 2 = 4; use --ranks 4"),
        (
            ["parallel.context=1", "parallel.tensor=3"],
            3,
            r"tensor 3 does not divide model.num_heads 4; set parallel.tensor 1, or a multiple of "
            r"3 as model.num_heads; parallel.tensor 3 does not divide model.ffn_size 1024",
        ),
        (
            ["parallel.context=1", "parallel.tensor=4", "model.ffn_size=1030"],
            4,
            r"tensor 4 does not divide model.ffn_size 1030; set parallel.tensor 2",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_what_would(
    recipe: Path, overrides: list[str], world: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_world(load_config(recipe, overrides), world)


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="enwiki_mlm"):
        load_config("no_such_recipe")


@pytest.mark.parametrize("override", ["steps", "=3", "name.x=1", "steps=[1"])
def test_a_bad_override_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(recipe, [override])


def test_the_hash_follows_the_values_and_not_the_spelling(recipe: Path) -> None:
    config = load_config(recipe)
    assert config_hash(config) == config_hash(load_config(recipe, ["seed=1"]))
    assert config_hash(config) != config_hash(load_config(recipe, ["seed=2"]))


LED = {
    "kind": "led",
    "hidden_size": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_heads": 2,
    "decoder_heads": 4,
    "encoder_ffn_size": 24,
    "decoder_ffn_size": 20,
    "max_source_positions": 64,
    "max_target_positions": 32,
    "attention_window": 8,
}


@pytest.fixture
def led_recipe(recipe: Path) -> Path:
    raw = yaml.safe_load(recipe.read_text())
    raw["model"] = LED
    raw["data"] |= {"seq_len": 64, "target_len": 32}
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def test_the_kind_of_the_model_decides_its_keys(recipe: Path, led_recipe: Path) -> None:
    config = load_config(led_recipe)
    assert config.model.kind == "led" and config.model.longest_vector == 24
    assert load_config("enwiki_mlm").model.kind == "longformer_mlm"
    for override, named in (
        ("model.num_layers=2", r"recipe.yaml: model.num_layers: unknown key \(.*\?\)$"),
        ("model.kind=bert", r"model.kind: there is no such kind; .* led, char_lm$"),
        ("model.kind=char_lm", r"model.num_layers: missing key; .*model.encoder_heads: unknown"),
    ):
        with pytest.raises(ConfigError, match=named):
            load_config(led_recipe, [override])


def test_all_faults_of_a_led_and_its_data_are_reported_at_once(led_recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            led_recipe,
            ["model.encoder_heads=3", "model.decoder_heads=5", "model.attention_window=[3, 4, 6]"],
        )
    for part in (
        "encoder_heads 3 does not divide hidden_size 16",
        "decoder_heads 5 does not divide",
        "attention_window has 3 entries for 2 layers",
        "attention_window 3 is odd",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"target_len is missing; .*isolate_documents is for"):
        load_config(led_recipe, ["data.target_len=null", "data.isolate_documents=true"])
    with pytest.raises(ConfigError, match="target_len is for pairs; a longformer_mlm reads text"):
        load_config("enwiki_mlm", ["data.target_len=8"])


def test_tensor_ranks_must_divide_both_halves_of_a_led(led_recipe: Path) -> None:
    assert check_world(load_config(led_recipe, ["parallel.tensor=2"]), 4) == 1
    with pytest.raises(ConfigError) as caught:
        check_world(load_config(led_recipe, ["parallel.tensor=4", "model.decoder_ffn_size=22"]), 8)
    assert str(caught.value).count("does not divide") == 2
    assert "model.encoder_heads 2; set parallel.tensor 2" in str(caught.value)
    assert "model.decoder_ffn_size 22; set parallel.tensor 2" in str(caught.value)


def test_source_and_target_must_fit_the_positions_of_a_led(led_recipe: Path) -> None:
    config = load_config(led_recipe, ["data.seq_len=63", "data.target_len=31"])
    assert check_world(config, 2) == 1
    longer = load_config(led_recipe, ["data.seq_len=65", "data.target_len=33"])
    with pytest.raises(ConfigError) as caught:
        check_world(longer, 2)
    for part in (
        "data.seq_len 65 (padded to 66 for 2 context ranks) is more than "
        "model.max_source_positions 64",
        "data.target_len 33 (padded to 34 for 2 context ranks) is more than "
        "model.max_target_positions 32",
    ):
        assert part in str(caught.value)


def test_training_sets_come_alone_or_with_weights(recipe: Path) -> None:
    alone = load_config(recipe, ["data.train=here"]).data
    assert [(c.path, c.weight) for c in alone.corpora] == [("here", 1.0)]
    blend = load_config(recipe, ["data.train=[{path: a, weight: 2}, {path: b, weight: 0.5}]"]).data
    assert [(c.path, c.weight) for c in blend.corpora] == [("a", 2.0), ("b", 0.5)]


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ("[]", "data.train: give a folder, or a list"),
        ("[{path: a, weight: 0}]", r"data.train\[0\].weight: .* greater than 0"),
        ("[{path: a, weight: 1}, {path: b}]", r"data.train\[1\].weight: missing key"),
        ("[{path: a, wieght: 1}]", r"data.train\[0\].wieght: unknown key"),
        ("3", "data.train: give a folder, or a list"),
    ],
)
def test_a_bad_corpus_is_named(recipe: Path, train: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(recipe, [f"data.train={train}"])


def test_a_key_that_stands_twice_is_refused_and_not_dropped(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "data:\n  seq_len: 64\n")
    with pytest.raises(ConfigError, match=r"the key data stands twice; .* line \d+") as caught:
        load_config(recipe)
    assert "\n" not in str(caught.value)


def test_yaml_may_still_take_values_over_from_another_mapping(recipe: Path) -> None:
    text = "eval: &shared {every: 5}\ncheckpoint: {<<: *shared, every: 7}\n"
    (recipe.parent / "merged.yaml").write_text(f"base: {recipe.name}\n{text}")
    merged = load_config(recipe.parent / "merged.yaml")
    assert (merged.checkpoint.every, merged.eval.every) == (7, 5)


@pytest.mark.parametrize("text", ["a: " + "[" * 5000, "{[1]: 2}"], ids=["deep", "list as key"])
def test_what_is_no_yaml_is_named(text: str, recipe: Path) -> None:
    recipe.write_text(text)
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(recipe)
