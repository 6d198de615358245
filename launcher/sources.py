"""Checks of a recipe's data before any rank starts."""

from __future__ import annotations

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.blend import open_corpora, training_corpora
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.reader import check_sizes


def check_data(config: TrainConfig) -> int:
    """Read all indexes, compare content and tokenizers, and see that the shards are whole.

    Returns:
        Entries of the vocabulary.

    Raises:
        ValueError: If a data set is missing, damaged, made with another tokenizer or from other
            labels, or holds what the model is not trained on.
    """
    data = config.data
    train = open_corpora(training_corpora(data), config.model.reads, data.cache)
    held_out = load_index(data.eval, data.cache)
    held_out.check_content(config.model.reads)
    held_out.check_tokenizer(train[0].tokenizer_sha256, f"the training data {train[0].folder}")
    held_out.check_labels(train[0].labels, f"the training data {train[0].folder}")
    if data.on_corrupt == "stop":  # to skip, the ranks have to look at every sample
        for index in (*train, held_out):
            check_sizes(index)
    return train[0].vocab_size
