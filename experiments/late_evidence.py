"""Pairs whose answer lies late: prose of one article, then, in the last line, what to write about.

    source   Alchemy is an influential philosophical tradition ... (300 to 16,000 tokens of others)
             Subject: Andre Agassi
    target   Andre Kirk Agassi is an American retired professional tennis player ...

The target is the first sentence of the subject's own article, the prose is of other articles, and
held-out pairs take theirs from articles that no training pair uses. So who has not read the last
line can only guess which of the subjects it is.
"""

from __future__ import annotations

import bz2
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from haloformer.data_pipeline.leads import split_lead
from haloformer.data_pipeline.mediawiki import iter_articles
from haloformer.data_pipeline.wikitext import clean_wikitext
from haloformer.launcher.rouge import sentences_of

NUM_SUBJECTS = 24
TOKENS = (300, 13_000)  # of a source, log-uniform; what is held out is longer than LATE
LATE = 4_000
_CHARACTERS_PER_TOKEN = 3.0  # about: a BPE of 1,024 has 2.5, so the longest source has 15,900
_MAX_BYTES = 1 << 24


class Article(NamedTuple):
    """A title, the first sentence of its lead, and its text."""

    title: str
    sentence: str
    text: str


def write_pairs(dump: Path, folder: Path, *, num_train: int, num_held_out: int) -> None:
    """Make ``train.jsonl`` and ``held_out.jsonl``; the same files for the same arguments."""
    articles = list(_articles(dump))
    rng = random.Random(0)
    rng.shuffle(articles)
    subjects = articles[:NUM_SUBJECTS]
    prose = articles[NUM_SUBJECTS:]
    cut = len(prose) * 4 // 5
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts, number, shortest in (
        ("train", prose[:cut], num_train, TOKENS[0]),
        ("held_out", prose[cut:], num_held_out, LATE),
    ):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for _ in range(number):
                subject = rng.choice(subjects)
                source = f"{_prose(rng, texts, shortest)}\nSubject: {subject.title}"
                pair = {"source": source, "target": subject.sentence}
                out.write(json.dumps(pair, ensure_ascii=False) + "\n")


def _articles(dump: Path) -> Iterator[Article]:
    with bz2.open(dump) as stream:
        for title, wikitext in iter_articles(stream, dump, _MAX_BYTES, keep_markup=True):
            parts = split_lead(wikitext)
            sentences = sentences_of(parts[1]) if parts is not None else []
            sentence = next((s for s in sentences if 8 <= len(s.split()) <= 40), None)
            if sentence is not None:
                yield Article(title, sentence, clean_wikitext(wikitext))


def _prose(rng: random.Random, texts: list[Article], shortest: int) -> str:
    """Consecutive text, over article borders where one is too short."""
    size = math.exp(rng.uniform(math.log(shortest), math.log(TOKENS[1]))) * _CHARACTERS_PER_TOKEN
    text = rng.choice(texts).text
    start = rng.randrange(len(text))
    text = text[start:]
    while len(text) < size:
        text += "\n" + rng.choice(texts).text
    return text[: int(size)]
