"""Windows change, weights do not: a model that was told is the model that was built so."""

import pytest
import torch

from haloformer.configs.models import CharLmConfig, LedConfig, ModelConfig
from haloformer.model.char_lm import CharLm
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.rows import whole_sequence
from haloformer.model.windows import WindowedAttention, set_windows

SIZES = {"hidden_size": 16, "initializer_range": 0.3, "hidden_dropout": 0.0}
STACK = {"num_layers": 2, "num_heads": 2, "ffn_size": 8, "max_positions": 24}
LED = {"encoder_layers": 2, "decoder_layers": 1, "encoder_heads": 2, "decoder_heads": 2}
LED |= {"encoder_ffn_size": 8, "decoder_ffn_size": 8, "max_source_positions": 24}
KINDS = {
    "char_lm": (CharLm, CharLmConfig, STACK, {"dilation": [1, 3], "attention_window": [4, 8]}),
    "mlm": (LongformerForMaskedLM, ModelConfig, STACK, {"dilation": [1, 2]}),
    "led": (LedForConditionalGeneration, LedConfig, LED, {"attention_window": [4, 12]}),
}


def loss(model, kind: str) -> float:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 20, (2, 24), generator=generator)
    inputs = (ids, ids[:, :7], ids[:, 1:8]) if kind == "led" else (ids, ids.roll(-1, 1))
    return model(*inputs, whole_sequence(ids, None, None)).loss_sum.item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_told_its_windows_is_the_model_that_was_built_with_them(kind: str) -> None:
    model_type, config_type, sizes, changed = KINDS[kind]
    before = config_type(attention_window=2, **SIZES, **sizes)
    after = config_type.model_validate({**before.model_dump(), **changed})
    model, built = model_type(before, 20), model_type(after, 20)
    built.load_state_dict(model.state_dict())
    first = loss(model, kind)
    set_windows(model, after, None)
    assert loss(model, kind) == loss(built, kind) != first
    layers = [module for module in model.modules() if isinstance(module, WindowedAttention)]
    twins = [module for module in built.modules() if isinstance(module, WindowedAttention)]
    assert [layer.spec for layer in layers] == [twin.spec for twin in twins]
    set_windows(model, before, None)
    assert loss(model, kind) == first
