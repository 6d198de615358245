"""How many parameters a recipe has, from its numbers alone."""

from __future__ import annotations

from haloformer.configs.models import (
    NUM_DISTANCES,
    CharLmConfig,
    ChoicesConfig,
    ClassifierConfig,
    CorefConfig,
    EncoderConfig,
    LedConfig,
    QuestionsConfig,
)


def num_parameters(
    config: EncoderConfig | LedConfig | CharLmConfig, vocab_size: int, num_labels: int = 2
) -> int:
    """Parameters of a model; the output projection is tied to the embedding.

    Args:
        config: Sizes.
        vocab_size: Entries of the token embedding.
        num_labels: Classes of a classifier, which its data knows.

    Returns:
        Their number, the tied embedding counted once.
    """
    if isinstance(config, LedConfig):
        return _led(config, vocab_size)
    if isinstance(config, CharLmConfig):
        return _char_lm(config, vocab_size)
    size = config.hidden_size
    rows = vocab_size + config.num_position_rows + config.type_vocab_size
    head = _head(config, vocab_size, num_labels)
    layers = config.num_layers * _encoder_layer(size, config.ffn_size)
    return rows * size + _norm(size) + layers + head


def _head(config: EncoderConfig, vocab_size: int, num_labels: int) -> int:
    size = config.hidden_size
    if isinstance(config, ClassifierConfig):
        return _linear(size, size) + _linear(size, num_labels)
    if isinstance(config, QuestionsConfig):
        return _linear(size, 2)
    if isinstance(config, ChoicesConfig):
        return _linear(size, 1)
    if isinstance(config, CorefConfig):
        mentions = 2 * (_linear(size, size) + _linear(size, 1))
        pairs = _linear(2 * size, 2 * size) + _linear(7 * size, size) + _linear(size, 1)
        return mentions + pairs + NUM_DISTANCES * size
    return _linear(size, size) + _norm(size) + vocab_size  # the masked language model's


def _led(config: LedConfig, vocab_size: int) -> int:
    size = config.hidden_size
    rows = vocab_size + config.max_source_positions + config.max_target_positions
    encoder = config.encoder_layers * _encoder_layer(size, config.encoder_ffn_size)
    # Self-attention and cross-attention: query, key, value, output each.
    attention = 2 * (4 * _linear(size, size) + _norm(size))
    decoder_layer = attention + _ffn(size, config.decoder_ffn_size) + _norm(size)
    return rows * size + 2 * _norm(size) + encoder + config.decoder_layers * decoder_layer


def _char_lm(config: CharLmConfig, vocab_size: int) -> int:
    size = config.hidden_size
    layer = 4 * _linear(size, size) + _ffn(size, config.ffn_size) + 2 * _norm(size)
    return vocab_size * size + config.num_layers * layer + _norm(size) + vocab_size


def _encoder_layer(size: int, ffn_size: int) -> int:
    # query, key, value, their global twins, output.
    return 7 * _linear(size, size) + _ffn(size, ffn_size) + 2 * _norm(size)


def _ffn(size: int, inner: int) -> int:
    return _linear(size, inner) + _linear(inner, size)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _norm(size: int) -> int:
    return 2 * size
