"""The settings of the paper, as it has them (Longformer, tables 4, 12, 14, sections 5 to 7)."""

import pytest

from haloformer.configs.load import check_world, load_config
from haloformer.configs.schema import CharLmConfig, EncoderConfig, LedConfig

BASE, LARGE = (768, 12, 12, 3072), (1024, 24, 16, 4096)


@pytest.mark.parametrize(
    ("recipe", "layers", "dropout", "steps", "gaps"),
    [
        ("char_lm_small", 12, 0.2, [430, 50, 50, 35, 5], {0: 6, 1: 2, 2: 2, 3: 2}),
        ("char_lm_large", 30, 0.4, [350, 25, 10, 5, 5], {0: 15, 1: 5, 2: 5, 3: 5}),
    ],
)
def test_the_character_model_is_that_of_table_12(recipe, layers, dropout, steps, gaps):
    phases = load_config(recipe).all_phases()
    configs = [phase.config for phase in phases]
    assert [config.steps for config in configs] == [1000 * thousands for thousands in steps]
    assert [config.data.seq_len for config in configs] == [2048, 4096, 8192, 16384, 23040]
    assert [config.batch.global_batch for config in configs] == [32, 32, 16, 16, 16]
    for number, config in enumerate(configs):
        model, optim = config.model, config.optim
        assert isinstance(model, CharLmConfig)
        assert (model.num_layers, model.num_heads, model.hidden_size) == (layers, 8, 512)
        windows = [model.window_of_layer(layer) for layer in range(layers)]
        assert windows == sorted(windows)
        assert (windows[0], windows[-1]) == (32 * 2**number, 512 * 2**number)
        dilated = [model.dilation_of_layer(layer) for layer in range(layers)]
        expected = [gap + 1 for gap, count in gaps.items() for _ in range(count)]
        assert dilated == [(1,) * 6 + (dilation,) * 2 for dilation in expected]
        assert (model.hidden_dropout, optim.clip_norm, optim.weight_decay) == (dropout, 0.25, 0.01)
        assert optim.learning_rate == pytest.approx(2.5e-4 / 2**number)
        assert optim.schedule == "constant"
        assert optim.warmup_steps == min(config.steps // 10, 10_000)


def test_the_small_models_first_windows_have_the_mean_of_table_4():
    model = load_config("char_lm_small").model
    assert isinstance(model, CharLmConfig)
    assert sum(map(model.window_of_layer, range(12))) / 12 == pytest.approx(230, abs=1)


@pytest.mark.parametrize(
    ("recipe", "size"), [("longformer_base_mlm", BASE), ("longformer_large_mlm", LARGE)]
)
def test_continued_pretraining_is_that_of_section_5(recipe, size):
    config = load_config(recipe)
    model, optim = config.model, config.optim
    assert isinstance(model, EncoderConfig)
    assert (model.hidden_size, model.num_layers, model.num_heads, model.ffn_size) == size
    assert (model.max_positions, model.attention_window, model.dilation) == (4096, 512, 1)
    assert config.batch.global_batch * config.data.seq_len == 2**18
    assert (config.steps, optim.learning_rate, optim.warmup_steps) == (65_000, 3e-5, 500)
    assert (optim.schedule, optim.power) == ("polynomial", 3.0)


@pytest.mark.parametrize(
    ("recipe", "width", "layers"), [("led_base_arxiv", 768, 6), ("led_large_arxiv", 1024, 12)]
)
def test_led_reads_16k_tokens_with_a_window_of_1024(recipe, width, layers):
    config = load_config(recipe)
    model = config.model
    assert isinstance(model, LedConfig)
    assert (model.hidden_size, model.encoder_layers, model.decoder_layers) == (
        width,
        layers,
        layers,
    )
    assert (config.data.seq_len, model.attention_window) == (16_384, 1024)
    assert config.data.global_tokens == "first"


@pytest.mark.parametrize(
    ("recipe", "kind", "epochs", "examples", "rate", "warmup"),
    [
        ("wikihop", "longformer_choice", 15, 43_738, 3e-5, 200),
        ("triviaqa", "longformer_qa", 5, 110_648, 3e-5, 1000),
        ("hotpotqa", "longformer_qa", 5, 90_447, 3e-5, 1000),
        ("imdb", "longformer_classifier", 15, 25_000, 3e-5, 1172),
        ("hyperpartisan", "longformer_classifier", 15, 516, 3e-5, 24),
    ],
)
def test_finetuning_is_that_of_table_14(recipe, kind, epochs, examples, rate, warmup):
    config = load_config(recipe)
    model, optim, batch = config.model, config.optim, config.batch.global_batch
    assert isinstance(model, EncoderConfig)
    assert (model.kind, batch) == (kind, 32)
    assert (model.hidden_size, model.num_layers, model.num_heads, model.ffn_size) == BASE
    assert config.steps == pytest.approx(epochs * examples / batch, abs=1)
    assert (optim.learning_rate, optim.warmup_steps, optim.schedule) == (rate, warmup, "linear")


def test_coreference_has_a_rate_for_the_encoder_and_one_for_what_is_new():
    optim = load_config("ontonotes").optim
    assert (optim.learning_rate, optim.head_learning_rate) == (1e-5, 1e-4)


@pytest.mark.parametrize("recipe", ["led_large_arxiv_8x8", "longformer_large_mlm_8x8"])
def test_the_recipes_of_many_nodes_fit_8_hosts_of_8(recipe):
    config = load_config(recipe)
    assert check_world(config, 64) * config.parallel.context == 64
    assert 8 % config.parallel.context == 0, "halos would leave the host"
