"""Small data sets of annotated examples that a tiny model can learn, written as prepare does.

classification   a text of one letter and its neighbours: "a" texts are good, "z" texts bad
questions        the capital letter in the text
choices          the candidate that stands first
coreference      all capital letters name one thing, all digits another
"""

import random
from pathlib import Path

import numpy as np

from haloformer.data_pipeline.annotated import Annotated, Span, token_spans
from haloformer.data_pipeline.index import ShardIndex
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.tokenizers import ByteTokenizer

LABELS = ("bad", "good")
CONTENTS = ("classification", "questions", "choices", "coreference")


def text_of(rng: random.Random, length: int, letters: str = "abcdefgh ") -> list[str]:
    return rng.choices(letters, k=length)


def example_of(content: str, number: int, length: int, rng: random.Random) -> Annotated:
    """One example whose last text has ``length`` letters, at least one of them marked."""
    note = {"id": f"{content} {number}"}
    if content == "classification":
        label = number % 2
        text = "".join(text_of(rng, length, "abcd " if label else "wxyz "))
        return Annotated((text,), {**note, "label": LABELS[label]})
    letters = text_of(rng, length)
    if content == "choices":
        right = number % 3
        candidates = [name * (2 if n == right else 1) for n, name in enumerate("pqr")]
        return Annotated(
            ("which?", *candidates, "".join(letters)),
            {**note, "label": right, "num_candidates": 3},
        )
    if content == "questions":
        # Long texts have it at their end, where a cut loses it.
        place = rng.randrange(length) if length < 40 else length - 1
        letters[place] = answer = "QXZ"[number % 3]
        answers = [answer, f"{answer}!"]
        return Annotated(
            ("who?", "".join(letters)), {**note, "answers": answers}, (Span(place, place + 1),)
        )
    places = sorted(rng.sample(range(length), min(length, 4)))
    for n, place in enumerate(places):
        letters[place] = "A" if n % 2 == 0 else "7"
    spans = tuple(Span(place, place + 1, n % 2) for n, place in enumerate(places))
    return Annotated(("".join(letters),), note, spans)


def write_examples(
    folder: Path,
    content: str,
    lengths: list[int],
    shard_tokens: int = 400,
    seed: int = 2,
    labels: tuple[str, ...] = LABELS,
) -> ShardIndex:
    """A data set with an example of every length."""
    folder.mkdir(parents=True)
    rng, tokenizer = random.Random(seed), ByteTokenizer()
    labels = labels if content == "classification" else ()
    with DatasetWriter(folder, tokenizer, shard_tokens, content, labels) as writer:
        for number, length in enumerate(lengths):
            example = example_of(content, number, length, rng)
            ids = [np.asarray(tokenizer.encode(text), np.int64) for text in example.segments]
            spans = token_spans(example.segments[-1], ids[-1], tokenizer, example.spans)
            writer.add_example(example, ids, spans, f"{content} {number}")
        return writer.close()
