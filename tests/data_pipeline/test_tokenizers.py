from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.tokenizers import (
    SPECIAL_NAMES,
    BpeTokenizer,
    ByteTokenizer,
    load_bpe,
    load_tokenizer,
    train_bpe,
)

CORPUS = [
    "the window slides over the long document\n" * 20,
    "x" + " " * 40 + "y\n",
    "Grüße, 漢字, 🙂 and <mask> <s>" * 9,
]
ODD_TEXTS = ["", " ", "\n\n  x", "naïve 漢字 🙂\r\n\ttabs", "\x00\x01", "<s><pad></s><unk><mask>"]


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train_bpe(CORPUS, 320)


def test_text_comes_back(bpe: BpeTokenizer) -> None:
    for text in [*CORPUS, *ODD_TEXTS]:
        for tokenizer in (ByteTokenizer(), bpe):
            assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_layout_is_robertas(bpe: BpeTokenizer) -> None:
    assert bpe.vocab_size <= 320 and bpe.merges
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.specials == (0, 1, 2, 3, tokenizer.vocab_size - 1)


def test_text_that_spells_a_special_token_does_not_become_one(bpe: BpeTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode("<s> a <mask> b</s><pad><unk>")
        assert not np.isin(ids, tokenizer.specials).any()


def test_training_is_repeatable_and_the_hash_tells_tokenizers_apart(bpe: BpeTokenizer) -> None:
    assert train_bpe(CORPUS, 320).sha256 == bpe.sha256
    assert train_bpe(CORPUS, 300).sha256 != bpe.sha256


def test_long_text_is_cut_where_it_makes_no_difference(bpe: BpeTokenizer) -> None:
    draw = np.random.default_rng(0)
    words = ["the", " ", "  ", "\n", "window", "漢", ",", " \n ", "1", "\u00a0"]
    text = "".join(draw.choice(words, 220_000))
    assert bpe.encode(text).tolist() == bpe.engine.encode(text).ids
    text = ("the" + " " * 50) * 5_000  # blanks run over the cut
    assert bpe.encode(text).tolist() == bpe.engine.encode(text).ids
    text = "x" * 263_000
    assert bpe.encode(text).tolist() == bpe.engine.encode(text).ids


def test_saved_tokenizers_load_and_are_the_same(tmp_path: Path, bpe: BpeTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert (loaded.kind, loaded.sha256) == (tokenizer.kind, tokenizer.sha256)
        assert loaded.encode(CORPUS[1]).tolist() == tokenizer.encode(CORPUS[1]).tolist()


def test_a_changed_file_of_a_saved_tokenizer_is_noticed(tmp_path: Path, bpe: BpeTokenizer) -> None:
    bpe.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text("utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-1]), "utf-8")
    with pytest.raises(DataError, match=r"is not the one that was saved"):
        load_tokenizer(tmp_path)


def test_a_folder_keeps_its_own_ids(tmp_path: Path, bpe: BpeTokenizer) -> None:
    # A RoBERTa-like folder with another order of ids.
    vocab = {token: len(bpe.tokens) - 1 - number for number, token in enumerate(bpe.tokens)}
    write_folder(tmp_path, vocab, bpe.merges)
    loaded = load_bpe(tmp_path)
    assert loaded.specials == tuple(vocab[name] for name in SPECIAL_NAMES)
    assert loaded.encode("the window").tolist() == [
        len(bpe.tokens) - 1 - number for number in bpe.encode("the window").tolist()
    ]


def write_folder(folder: Path, vocab: dict, merges) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    text = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + text, "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: (v | {"<mask>": 9999}, m), "ids are not 0 to"),
        (lambda v, m: (v | {"<mask>": "4"}, m), "an id is not an integer"),
        (lambda v, m: ({t: i for t, i in v.items() if t != "<mask>"}, m), "lacks <mask>"),
        (lambda v, m: ({"!!" if t == "!" else t: i for t, i in v.items()}, m), "1 of the 256"),
        (lambda v, m: (v, [*m, ("zq", "zq")]), r"merges.txt:\d+: 'zq' is not in vocab.json"),
        (lambda v, m: (v, [*m, ("a", "b c")]), "two tokens and a blank"),
    ],
)
def test_a_malformed_folder_is_refused_by_name(change, message, tmp_path, bpe) -> None:
    vocab = {token: number for number, token in enumerate(bpe.tokens)}
    write_folder(tmp_path, *change(vocab, list(bpe.merges)))
    with pytest.raises(DataError, match=message):
        load_bpe(tmp_path)


def test_missing_files_and_tiny_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab.json: no such file"):
        load_bpe(tmp_path)
    with pytest.raises(DataError, match="at least 261"):
        train_bpe(["text"], 260)
