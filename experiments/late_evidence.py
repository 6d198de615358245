"""Pairs whose answer lies late: prose of several articles, and at its end a passage of one more.

    source   Alchemy is an influential ...  (100 to 15,000 tokens of other articles)
             ... Agassi was the first male player to win four ...  (600 tokens of the last article)
    target   Andre Agassi

The target is the title of the last article, which is one of twelve. Held-out pairs take their
prose, of 4,000 tokens or more, from articles, and their passages from parts of articles, that no
training pair uses. So who has not read the end can only guess which of the twelve it is.
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
PROSE = (250, 37_000)  # log-uniform
LATE = 10_000  # least of held-out prose
PASSAGE = 1_500
_SHARE = 0.8  # of articles, and of each subject's body, for training
_MAX_BYTES = 1 << 24


class Article(NamedTuple):
    """The title, and what follows the lead."""

    title: str
    body: str


def write_pairs(dump: Path, folder: Path, *, num_train: int, num_held_out: int) -> None:
    """Make ``train.jsonl`` and ``held_out.jsonl``; the same files for the same arguments."""
    articles = list(_articles(dump))
    rng = random.Random(0)
    rng.shuffle(articles)
    subjects, prose = articles[:NUM_SUBJECTS], articles[NUM_SUBJECTS:]
    cut = int(len(prose) * _SHARE)
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts, number, shortest, part in (
        ("train", prose[:cut], num_train, PROSE[0], (0.0, _SHARE)),
        ("held_out", prose[cut:], num_held_out, LATE, (_SHARE, 1.0)),
    ):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for _ in range(number):
                subject = rng.choice(subjects)
                source = f"{_prose(rng, texts, shortest)}\n{_passage(rng, subject.body, part)}"
                pair = {"source": source, "target": subject.title}
                out.write(json.dumps(pair, ensure_ascii=False) + "\n")


def _articles(dump: Path) -> Iterator[Article]:
    """Articles that are long enough for a passage in either part."""
    with bz2.open(dump) as stream:
        for title, wikitext in iter_articles(stream, dump, _MAX_BYTES, keep_markup=True):
            parts = split_lead(wikitext)
            if parts is not None and len(parts[0]) * (1 - _SHARE) >= 2 * PASSAGE:
                yield Article(title, parts[0])


def _prose(rng: random.Random, texts: list[Article], shortest: int) -> str:
    """Consecutive text, over article borders where one is too short."""
    size = int(math.exp(rng.uniform(math.log(shortest), math.log(PROSE[1]))))
    body = rng.choice(texts).body
    text = body[rng.randrange(len(body)) :]
    while len(text) < size:
        text += "\n" + rng.choice(texts).body
    return text[:size]


def _passage(rng: random.Random, body: str, part: tuple[float, float]) -> str:
    first, last = (int(len(body) * share) for share in part)
    start = rng.randrange(first, last - PASSAGE)
    return body[start : start + PASSAGE]
