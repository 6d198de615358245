"""The parameter count from a recipe's numbers is that of the model that is built from it."""

import pytest

from haloformer.configs.sizes import num_parameters
from haloformer.model.char_lm import CharLm
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import LongformerForMaskedLM
from model_layouts import char_config, led_config, longformer_config


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (longformer_config(), LongformerForMaskedLM),
        (led_config(encoder_layers=3, attention_window=4), LedForConditionalGeneration),
        (char_config(), CharLm),
    ],
    ids=["longformer_mlm", "led", "char_lm"],
)
def test_parameters_are_counted_as_the_model_has_them(config, model) -> None:
    built = model(config, 37)
    assert num_parameters(config, 37) == sum(p.numel() for p in built.parameters())
