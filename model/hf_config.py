"""transformers' config.json <-> our model sections.

Three things differ. transformers' Longformer counts the rows of its position table, we count
tokens. Its window is two-sided like ours, while AI2's original code wrote one side into a list of
the same name. And it leaves out of the file what equals its defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from haloformer.configs.models import EncoderConfig, LedConfig, ModelConfig


class TokenIds(NamedTuple):
    """Ids of the special tokens that a config.json names."""

    bos: int
    pad: int
    eos: int


# transformers 5.23 LongformerConfig: what a key means when config.json does not have it.
LONGFORMER_DEFAULTS: dict[str, Any] = {
    "attention_window": 512,
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "sep_token_id": 2,
    "tie_word_embeddings": True,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


# transformers 5.23 LEDConfig.
LED_DEFAULTS: dict[str, Any] = {
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "attention_dropout": 0.0,
    "attention_window": 512,
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "init_std": 0.02,
    "max_decoder_position_embeddings": 1024,
    "max_encoder_position_embeddings": 16384,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
    "vocab_size": 50265,
}


def with_defaults(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A config.json filled up with what transformers would assume."""
    return {**defaults, **raw}


def longformer_config(raw: dict[str, Any]) -> ModelConfig:
    """The model section of a transformers Longformer.

    Args:
        raw: Content of config.json.

    Raises:
        ValueError: If the model is of a kind that our layers do not have, or a size is invalid.
    """
    full = with_defaults(raw, LONGFORMER_DEFAULTS)
    _refuse_other("hidden_act", full["hidden_act"], "gelu")
    _refuse_other("tie_word_embeddings", full["tie_word_embeddings"], True)
    refuse_one_sided(raw)
    padding = full["pad_token_id"]
    return ModelConfig(
        hidden_size=full["hidden_size"],
        num_layers=full["num_hidden_layers"],
        num_heads=full["num_attention_heads"],
        ffn_size=full["intermediate_size"],
        max_positions=full["max_position_embeddings"] - padding - 1,
        attention_window=full["attention_window"],
        hidden_dropout=full["hidden_dropout_prob"],
        attention_dropout=full["attention_probs_dropout_prob"],
        layer_norm_eps=full["layer_norm_eps"],
        initializer_range=full["initializer_range"],
        type_vocab_size=full["type_vocab_size"],
        padding_position=padding,
    )


def led_config(raw: dict[str, Any]) -> LedConfig:
    """The model section of a transformers LED.

    Args:
        raw: Content of config.json.

    Raises:
        ValueError: If the model is of a kind that our layers do not have, or a size is invalid.
    """
    full = with_defaults(raw, LED_DEFAULTS)
    _refuse_other("activation_function", full["activation_function"], "gelu")
    _refuse_other("tie_word_embeddings", full["tie_word_embeddings"], True)
    refuse_one_sided(raw)
    return LedConfig(
        hidden_size=full["d_model"],
        encoder_layers=full["encoder_layers"],
        decoder_layers=full["decoder_layers"],
        encoder_heads=full["encoder_attention_heads"],
        decoder_heads=full["decoder_attention_heads"],
        encoder_ffn_size=full["encoder_ffn_dim"],
        decoder_ffn_size=full["decoder_ffn_dim"],
        max_source_positions=full["max_encoder_position_embeddings"],
        max_target_positions=full["max_decoder_position_embeddings"],
        attention_window=full["attention_window"],
        hidden_dropout=full["dropout"],
        attention_dropout=full["attention_dropout"],
        activation_dropout=full["activation_dropout"],
        initializer_range=full["init_std"],
    )


def longformer_raw(
    config: EncoderConfig, vocab_size: int, tokens: TokenIds, labels: Sequence[str] = ()
) -> dict[str, Any]:
    """The config.json of a Longformer that was trained here.

    What transformers has no word for stands under our own names; ``refuse_ours_alone`` finds it.

    Args:
        config: Sizes of a model that transformers has.
        vocab_size: Entries of the token embedding.
        tokens: Special tokens of the tokenizer.
        labels: Names of a classifier's classes.
    """
    assert config.architecture is not None
    more: dict[str, Any] = {}
    if config.causal:
        more["causal"] = True
    if config.dilation != 1:
        more["dilation"] = config.dilation
    if config.padding_position != tokens.pad:
        more["padding_position"] = config.padding_position
    if labels:
        more["id2label"] = {str(number): label for number, label in enumerate(labels)}
        more["label2id"] = {label: number for number, label in enumerate(labels)}
    return more | {
        "architectures": [config.architecture],
        "model_type": "longformer",
        "attention_probs_dropout_prob": config.attention_dropout,
        "attention_window": [config.window_of_layer(i) for i in range(config.num_layers)],
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.ffn_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.num_position_rows,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "pad_token_id": tokens.pad,
        "sep_token_id": tokens.eos,
        "tie_word_embeddings": True,
        "type_vocab_size": config.type_vocab_size,
        "vocab_size": vocab_size,
    }


def led_raw(config: LedConfig, vocab_size: int, tokens: TokenIds) -> dict[str, Any]:
    """The config.json of an LED that was trained here; its decoder starts with </s>, as BART's."""
    section = config.encoder_section()
    return {
        **LED_DEFAULTS,
        "architectures": ["LEDForConditionalGeneration"],
        "model_type": "led",
        "activation_dropout": config.activation_dropout,
        "attention_dropout": config.attention_dropout,
        "attention_window": [section.window_of_layer(i) for i in range(config.encoder_layers)],
        "bos_token_id": tokens.bos,
        "d_model": config.hidden_size,
        "decoder_attention_heads": config.decoder_heads,
        "decoder_ffn_dim": config.decoder_ffn_size,
        "decoder_layers": config.decoder_layers,
        "decoder_start_token_id": tokens.eos,
        "dropout": config.hidden_dropout,
        "encoder_attention_heads": config.encoder_heads,
        "encoder_ffn_dim": config.encoder_ffn_size,
        "encoder_layers": config.encoder_layers,
        "eos_token_id": tokens.eos,
        "init_std": config.initializer_range,
        "is_encoder_decoder": True,
        "max_decoder_position_embeddings": config.max_target_positions,
        "max_encoder_position_embeddings": config.max_source_positions,
        "pad_token_id": tokens.pad,
        "vocab_size": vocab_size,
    }


def refuse_ours_alone(raw: dict[str, Any]) -> None:
    """Refuse to write a model that transformers would load and compute differently.

    Raises:
        ValueError: Naming the setting and what to train with instead.
    """
    if raw.get("model_type") != "longformer":
        return
    remedies = {
        "causal": "causal false",
        "dilation": "dilation 1",
        "padding_position": f"padding_position {raw['pad_token_id']}, the id of <pad>",
    }
    for key, remedy in remedies.items():
        if key in raw:
            raise ValueError(
                f"model.{key} is {raw[key]}, which transformers' Longformer does not have, so this "
                f"model cannot be exported; train one with {remedy}"
            )


def refuse_one_sided(raw: dict[str, Any]) -> None:
    """Refuse the config of AI2's original code, whose windows count one side.

    Raises:
        ValueError: Naming the keys it was recognised by, and the remedy.
    """
    marks = ["attention_dilation"] if "attention_dilation" in raw else []
    # The published transformers versions of AI2's models say "longformer" here.
    if raw.get("attention_mode", "longformer") != "longformer":
        marks.insert(0, "attention_mode")
    if marks:
        raise ValueError(
            f"config.json has {', '.join(marks)}: it is from AI2's longformer package, whose "
            "attention_window counts one side and whose weights have other names; load the "
            "transformers version of the model, or double attention_window and remove these keys"
        )


def _refuse_other(key: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise ValueError(f"config.json: {key} is {value!r}, but our layers have {wanted!r} only")
