"""Pairs whose answer lies late: prose of several articles, and at its end a passage of one more.

    source   Alchemy is an influential ...  (up to 14,000 tokens of other articles)
             Andre Agassi: was the first male player to win four ...
             Andre Agassi: Australian Open and a 7-time finalist ...  (600 of the last article)
    target   Andre Agassi

The target is the title of the last article, which is one of twelve. Held-out pairs take their
prose, of 4,000 tokens or more, from articles, and their passages from parts of articles, that no
training pair uses. So who has not read the end can only guess which of the twelve it is. Short
pairs, which 1,024 tokens hold, are for the short model that both arms start from.
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

NUM_SUBJECTS = 12
# Characters, of which the tokenizer of this data puts 2.5 into a token.
SHORT, ANY, LATE = (50, 500), (50, 34_000), (10_000, 34_000)  # of prose, log-uniform within
PASSAGE = 1_500  # before titles are put into it
_WORDS_PER_LINE = 8
_SHARE = 0.8  # of articles, and of each subject's body, for training
_MAX_BYTES = 1 << 24


class Article(NamedTuple):
    """The title, and what follows the lead."""

    title: str
    body: str


def write_pairs(dump: Path, folder: Path, *, num_train: int, num_held_out: int) -> None:
    """Make short.jsonl, train.jsonl and held_out.jsonl; the same for the same arguments."""
    articles = list(_articles(dump))
    rng = random.Random(0)
    rng.shuffle(articles)
    # A subject has room for a passage in either part of its body.
    longest = [a for a in articles if len(a.body) * (1 - _SHARE) >= 1.5 * PASSAGE]
    subjects = longest[:NUM_SUBJECTS]
    prose = [article for article in articles if article not in subjects]
    cut = int(len(prose) * _SHARE)
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts, number, part, sizes in (
        ("short", prose[:cut], num_train, (0.0, _SHARE), SHORT),
        ("train", prose[:cut], num_train, (0.0, _SHARE), ANY),
        ("held_out", prose[cut:], num_held_out, (_SHARE, 1.0), LATE),
    ):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for _ in range(number):
                subject = rng.choice(subjects)
                source = f"{_prose(rng, texts, sizes)}\n{_passage(rng, subject, part)}"
                pair = {"source": source, "target": subject.title}
                out.write(json.dumps(pair, ensure_ascii=False) + "\n")


def _articles(dump: Path) -> Iterator[Article]:
    """Articles that have a lead and more."""
    with bz2.open(dump) as stream:
        for title, wikitext in iter_articles(stream, dump, _MAX_BYTES, keep_markup=True):
            parts = split_lead(wikitext)
            if parts is not None:
                yield Article(title, parts[0])


def _prose(rng: random.Random, texts: list[Article], sizes: tuple[int, int]) -> str:
    """Consecutive text, over article borders where one is too short."""
    size = int(math.exp(rng.uniform(math.log(sizes[0]), math.log(sizes[1]))))
    body = rng.choice(texts).body
    text = body[rng.randrange(len(body)) :]
    while len(text) < size:
        text += "\n" + rng.choice(texts).body
    return text[:size]


def _passage(rng: random.Random, subject: Article, part: tuple[float, float]) -> str:
    """Consecutive text of a subject in lines that begin with its title."""
    first, last = (int(len(subject.body) * share) for share in part)
    start = rng.randrange(first, last - PASSAGE)
    words = subject.body[start : start + PASSAGE].split()
    lines = [words[at : at + _WORDS_PER_LINE] for at in range(0, len(words), _WORDS_PER_LINE)]
    return "\n".join(f"{subject.title}: {' '.join(line)}" for line in lines)
