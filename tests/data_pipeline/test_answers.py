"""Where answers stand, held to every place of a text looked at by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from haloformer.data_pipeline.annotated import Span, token_spans
from haloformer.data_pipeline.answers import find_answers
from haloformer.data_pipeline.tokenizers import ByteTokenizer, train_bpe


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_found_at_every_place_as_whole_words(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("aB, ") for _ in range(80))
    answers = ["a", "Ab", "b, a", "", " a ", "ba"]
    expected = {
        (start, stop)
        for start in range(len(text))
        for stop in range(start + 1, len(text) + 1)
        if text[start:stop].lower() in {answer.strip().lower() for answer in answers}
        and not (start > 0 and text[start - 1 : start + 1].isalnum())
        and not (stop < len(text) and text[stop - 1 : stop + 1].isalnum())
    }
    assert find_answers(text, answers) == tuple(Span(*place) for place in sorted(expected))


def test_letters_that_grow_when_small_do_not_shift_what_follows() -> None:
    text = "\u0130stanbul, \u1e9e. istanbul ISTANBUL"
    assert [text[s.start : s.stop] for s in find_answers(text, ["Istanbul"])] == [
        "istanbul", "ISTANBUL",
    ]  # fmt: skip


def test_the_first_64_are_kept() -> None:
    found = find_answers("b " * 100 + "a " * 100, ["a", "b"])
    assert found == tuple(Span(2 * n, 2 * n + 1) for n in range(64))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_token_spans_cover_their_characters_and_no_token_more(kind: str) -> None:
    text = "The Antlers: na\u00efve \u4e2d\u6587 \U0001f600 antlers, the Antler"
    tokenizer = ByteTokenizer() if kind == "byte" else train_bpe([text] * 20, 320)
    ids = tokenizer.encode(text)
    ends = np.cumsum(tokenizer.byte_lengths(ids))
    begins = ends - tokenizer.byte_lengths(ids)
    for start in (0, 4, 13, 16, 19, 22, 24):
        for stop in range(start + 1, len(text) + 1):
            ((first, last, group),) = token_spans(text, ids, tokenizer, [Span(start, stop, 7)])
            from_byte, to_byte = len(text[:start].encode()), len(text[:stop].encode())
            assert group == 7 and begins[first] <= from_byte < ends[first]
            assert begins[last] < to_byte <= ends[last]
    assert token_spans(text, ids, tokenizer, [Span(0, 3), Span(0, 3)]) == [
        [0, 2 if kind == "byte" else 0, 0]
    ]
