"""The pairs of Figure 3's experiment: who has not read the end cannot know the answer."""

import bz2
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from late_evidence import LATE, NUM_SUBJECTS, write_pairs

NUM_ARTICLES, WORDS = NUM_SUBJECTS + 10, 2500


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of articles whose every word tells the article and the word's number in it."""
    folder = tmp_path_factory.mktemp("late")
    dump = folder / "dump.xml.bz2"
    pages = (
        f"<page><title>T{n}</title><ns>0</ns><revision><text>{article(n)}</text></revision></page>"
        for n in range(NUM_ARTICLES)
    )
    dump.write_bytes(bz2.compress(f"<mediawiki>{''.join(pages)}</mediawiki>".encode()))
    write_pairs(dump, folder, num_train=60, num_held_out=12)
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }


def article(n):
    lead = f"T{n} is subject number {n} of those that this test has made up for itself. " * 4
    return f"{lead}\n== Body ==\n" + " ".join(f"a{n}b{word}c" for word in range(WORDS))


def words_of(text):
    """(article, number) of each whole word."""
    return [(int(n), int(word)) for n, word in re.findall(r"a(\d+)b(\d+)c", text)]


def parts_of(pair):
    """Prose and passage, whose every line begins with the title."""
    start = pair["source"].index("\nT")
    prose, passage = pair["source"][:start], pair["source"][start + 1 :]
    assert all(line.startswith(f"{pair['target']}: ") for line in passage.splitlines())
    return prose, passage


def test_the_passage_at_the_end_alone_is_of_the_article_that_is_named(pairs):
    for pair in [*pairs["train"], *pairs["held_out"]]:
        prose, passage = (words_of(part) for part in parts_of(pair))
        assert {f"T{article}" for article, _ in passage} == {pair["target"]}
        assert pair["target"] not in {f"T{article}" for article, _ in prose}


def test_held_out_pairs_share_no_text_with_training_and_their_evidence_is_late(pairs):
    train, held_out = (
        {word for pair in pairs[name] for part in parts_of(pair) for word in words_of(part)}
        for name in ("train", "held_out")
    )
    assert train and held_out and not train & held_out
    assert all(len(parts_of(pair)[0]) >= LATE[0] for pair in pairs["held_out"])
