"""How many parameters a recipe has, from its numbers alone."""

from __future__ import annotations

from haloformer.configs.schema import ModelConfig


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the Longformer MLM model; the output projection is tied to the embedding.

    Args:
        config: Sizes.
        vocab_size: Entries of the token embedding.
    """
    size = config.hidden_size
    norm = 2 * size
    square = size * size + size
    rows = vocab_size + config.num_position_rows + config.type_vocab_size
    embeddings = rows * size + norm
    # query, key, value, their global twins, output.
    attention = 7 * square
    ffn = 2 * size * config.ffn_size + config.ffn_size + size
    layer = attention + ffn + 2 * norm
    head = square + norm + vocab_size
    return embeddings + config.num_layers * layer + head
