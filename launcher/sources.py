"""Checks of a recipe's data before any rank starts."""

from __future__ import annotations

from pathlib import Path

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.index import load_index


def check_data(config: TrainConfig) -> int:
    """Read both indexes and compare their tokenizers.

    Returns:
        Entries of the vocabulary.

    Raises:
        ValueError: If a data set is missing, damaged, or made with another tokenizer.
    """
    train = load_index(Path(config.data.train))
    held_out = load_index(Path(config.data.eval))
    held_out.check_tokenizer(train.tokenizer_sha256, f"the training data {config.data.train}")
    return train.vocab_size
