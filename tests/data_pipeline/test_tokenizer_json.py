"""tokenizer.json encodes as our tokenizers do, whatever the text."""

import random

import pytest
from tokenizers import Tokenizer as Engine

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.tokenizer_json import (
    byte_characters,
    fast_tokenizer,
    tokenizer_sha256_of,
    write_for_transformers,
)
from haloformer.data_pipeline.tokenizers import ByteTokenizer, load_bpe, train_bpe

CORPUS = ["the halo goes round the window"] * 20 + ["Grüße <mask> aus </s> Köln"] * 5


def texts():
    """Every kind of character, and texts that spell special tokens."""
    draw = random.Random(7)
    yield from ("", " ", "\n\n  x", "<s>a</s><pad><unk><mask>", "the <mask> of <s>", "\x00\x7f\xa0")
    yield "".join(map(chr, range(1, 0x250)))
    for length in (3, 40, 3000):
        ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x11000))
        yield "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_ids_are_the_same_between_bos_and_eos(kind, tmp_path):
    ours = ByteTokenizer() if kind == "byte" else train_bpe(CORPUS, 300)
    write_for_transformers(ours, tmp_path, 128)
    engine = Engine.from_file(str(tmp_path / "tokenizer.json"))
    assert engine.get_vocab_size() == ours.vocab_size
    for text in texts():
        expected = ours.encode(text).tolist()
        assert engine.encode(text).ids == [0, *expected, 2], text
        assert engine.decode(expected, skip_special_tokens=False) == text
    for name, number in zip(
        ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), ours.specials, strict=True
    ):
        assert engine.token_to_id(name) == number


def test_what_is_written_can_be_loaded_as_ours_again(tmp_path):
    ours = train_bpe(CORPUS, 300)
    write_for_transformers(ours, tmp_path, 128)
    assert load_bpe(tmp_path).sha256 == ours.sha256


def test_every_byte_has_its_own_character():
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert characters[ord("A")] == "A" and characters[32] == "\u0120"
    assert len(fast_tokenizer(ByteTokenizer()).encode("a b").ids) == 5


def test_a_vocabulary_without_our_specials_is_named_by_the_file_that_has_it(tmp_path):
    engine = fast_tokenizer(ByteTokenizer())
    path = tmp_path / "tokenizer.json"
    path.write_text(engine.to_str().replace('"<mask>"', '"<blank>"'))
    with pytest.raises(DataError, match=rf"^{path}: the vocabulary lacks <mask>; ") as caught:
        tokenizer_sha256_of(tmp_path)
    assert "vocab.json" not in str(caught.value)
