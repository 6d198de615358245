"""Data sets and recipes made on the fly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.tokenizers import ByteTokenizer, Tokenizer

MakeDataset = Callable[..., Path]
MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write documents given by their token counts (random letters) or as texts."""

    def make(
        documents: Sequence[int | str],
        *,
        shard_tokens: int = 200,
        name: str = "train",
        tokenizer: Tokenizer | None = None,
    ) -> Path:
        used = ByteTokenizer() if tokenizer is None else tokenizer
        letters = np.random.default_rng(len(documents))
        folder = tmp_path / name
        folder.mkdir()
        with DatasetWriter(folder, used, shard_tokens) as writer:
            for number, document in enumerate(documents):
                text = document
                if isinstance(document, int):
                    text = bytes(letters.integers(97, 123, document, np.uint8)).decode()
                assert isinstance(text, str)
                writer.add(text, used.encode(text), f"document {number}")
            writer.close()
        return folder

    return make


@pytest.fixture
def make_config() -> MakeConfig:
    def make(**changes: object) -> DataConfig:
        values: dict[str, object] = {"train": "train", "eval": "eval", "seq_len": 32}
        return DataConfig.model_validate({**values, "shuffle_block": 4, **changes})

    return make


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakeDataset:
    """Write pairs: number n has 5 n + 1 letters -> n + 1 digits."""

    def make(num_pairs: int, *, name: str = "train") -> Path:
        tokenizer, folder = ByteTokenizer(), tmp_path / name
        folder.mkdir()
        with DatasetWriter(folder, tokenizer, 120, "pairs") as writer:
            for n in range(num_pairs):
                texts = chr(97 + n % 26) * (5 * n + 1), str(n % 10) * (n + 1)
                writer.add_pair(texts, *(tokenizer.encode(text) for text in texts), f"pair {n}")
            writer.close()
        return folder

    return make
