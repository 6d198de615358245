"""Data sets and recipes made on the fly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.annotated import Annotated, Span, token_spans
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


def annotated(content: str, n: int) -> Annotated:
    """Example number n of a kind, longer with n; texts of letters, "ab" is an answer or mention."""
    text = f"{chr(97 + n % 26)}ab " * (n + 1)
    spans = tuple(Span(at, at + 2, at // 4 % 2) for at in range(1, len(text), 4))
    if content == "classification":
        return Annotated((text,), {"id": f"e{n}", "label": ("neg", "pos")[n % 2]})
    if content == "questions":
        once = tuple(span._replace(group=0) for span in spans)
        return Annotated(("who? " * (n % 3 + 1), text), {"id": f"e{n}", "answers": ["ab"]}, once)
    if content == "choices":
        candidates = [f"c{i}" for i in range(n % 3 + 2)]
        note = {"id": f"e{n}", "label": n % 2, "num_candidates": len(candidates)}
        return Annotated(("query", *candidates, text, "second document"), note)
    return Annotated((text,), {"id": f"e{n}"}, spans)


@pytest.fixture
def make_examples(tmp_path: Path) -> MakeDataset:
    """Write annotated examples of a kind, in several shards."""

    def make(content: str, num_examples: int, *, tokenizer: Tokenizer | None = None) -> Path:
        used = ByteTokenizer() if tokenizer is None else tokenizer
        folder = tmp_path / content
        folder.mkdir()
        labels = ("neg", "pos") if content == "classification" else ()
        with DatasetWriter(folder, used, 120, content, labels) as writer:  # type: ignore[arg-type]
            for n in range(num_examples):
                example = annotated(content, n)
                segments = [used.encode(text) for text in example.segments]
                spans = token_spans(example.segments[-1], segments[-1], used, example.spans)
                writer.add_example(example, segments, spans, f"example {n}")
            writer.close()
        return folder

    return make
