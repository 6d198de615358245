"""Checks of a recipe's data before any rank starts."""

from __future__ import annotations

from pathlib import Path

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.reader import check_sizes


def check_data(config: TrainConfig) -> int:
    """Read both indexes, compare content and tokenizers, and see that the shards are whole.

    Returns:
        Entries of the vocabulary.

    Raises:
        ValueError: If a data set is missing, damaged, made with another tokenizer, or holds what
            the model is not trained on.
    """
    train = load_index(Path(config.data.train))
    held_out = load_index(Path(config.data.eval))
    for index in (train, held_out):
        index.check_content(config.model.reads)
    held_out.check_tokenizer(train.tokenizer_sha256, f"the training data {config.data.train}")
    if config.data.on_corrupt == "stop":  # to skip, the ranks have to look at every sample
        check_sizes(train)
        check_sizes(held_out)
    return train.vocab_size
