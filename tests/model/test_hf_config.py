"""A recipe's model section and transformers' config.json say the same."""

import pytest
import torch
import transformers

import hf_peers
from haloformer.configs.models import ClassifierConfig, LedConfig, ModelConfig, QuestionsConfig
from haloformer.model.convert import plain_from_config, save_pretrained
from haloformer.model.hf_config import (
    TokenIds,
    led_config,
    led_raw,
    longformer_config,
    longformer_raw,
)

TOKENS = TokenIds(bos=0, pad=1, eos=2)
LONGFORMER = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "ffn_size": 40,
    "max_positions": 60,
    "attention_window": [4, 8],
    "hidden_dropout": 0.3,
    "attention_dropout": 0.2,
    "layer_norm_eps": 1e-3,
    "initializer_range": 0.05,
}
LED = {
    "hidden_size": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_heads": 3,
    "decoder_heads": 4,
    "encoder_ffn_size": 40,
    "decoder_ffn_size": 32,
    "max_source_positions": 64,
    "max_target_positions": 40,
    "attention_window": [4, 8],
    "hidden_dropout": 0.3,
    "attention_dropout": 0.2,
    "activation_dropout": 0.25,
    "initializer_range": 0.05,
}


def test_both_ways_give_the_section_back():
    longformer = ModelConfig(**LONGFORMER)
    assert longformer_config(longformer_raw(longformer, hf_peers.VOCAB, TOKENS)) == longformer
    led = LedConfig(**LED)
    assert led_config(led_raw(led, hf_peers.VOCAB, TOKENS)) == led


CONFIGS = [
    ModelConfig(**LONGFORMER),
    ClassifierConfig(**LONGFORMER),
    QuestionsConfig(**LONGFORMER),
    LedConfig(**LED),
]


def scores_of(output):
    if "start_logits" in output:  # transformers' answer to a question has no ``logits``
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_transformers_computes_the_same_from_what_is_saved(config, tmp_path):
    torch.manual_seed(0)
    labels = ("bad", "good", "ugly") if isinstance(config, ClassifierConfig) else ()
    plain = plain_from_config(config, hf_peers.VOCAB, TOKENS, labels)
    hf_peers.scrambled(plain)
    save_pretrained(plain, tmp_path / "saved")
    peer = getattr(transformers, config.architecture).from_pretrained(tmp_path / "saved").eval()
    ids, mask, chosen = hf_peers.batch([32, 21], [[0, 5], [0]])
    call = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": chosen}
    if isinstance(config, LedConfig):
        call["labels"] = hf_peers.batch([7, 7], [])[0]
    with torch.no_grad():
        found, expected = plain(**call).logits, scores_of(peer(**call))
    per_token = isinstance(config, ModelConfig | QuestionsConfig)
    real = mask.bool() if per_token else slice(None)
    if labels:
        assert peer.config.id2label == dict(enumerate(labels)) and found.shape[1] == 3
    assert hf_peers.relative_error(found[real], expected[real]) < 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": True}, r"model\.causal is True, .* train one with causal false"),
        ({"dilation": [1, 2, 1]}, r"model\.dilation is \[1, 2, 1\], .* train one with dilation 1"),
        ({"padding_position": 3}, r"model\.padding_position is 3, .* padding_position 1"),
    ],
)
def test_what_transformers_does_not_have_is_not_written(changed, message, tmp_path):
    plain = plain_from_config(ModelConfig(**LONGFORMER | changed), hf_peers.VOCAB, TOKENS)
    with pytest.raises(ValueError, match=message):
        save_pretrained(plain, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
