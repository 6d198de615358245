"""The pairs of Figure 3's experiment: who has not read the end cannot know the answer."""

import bz2
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from late_evidence import LATE, NUM_SUBJECTS, TOKENS, write_pairs

NUM_ARTICLES = NUM_SUBJECTS + 10


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
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
    return f"{lead}\n== Body ==\n" + f"word{n} " * 400


def test_the_last_line_alone_decides_the_target(pairs):
    for pair in [*pairs["train"], *pairs["held_out"]]:
        prose, _, last = pair["source"].rpartition("\n")
        title = last.removeprefix("Subject: ")
        assert pair["target"].startswith(f"{title} is subject number {title[1:]} of")
        assert title not in prose.split(), "the prose is of other articles"


def test_held_out_prose_is_long_and_of_articles_that_no_training_pair_has(pairs):
    words = {name: words_of(group) for name, group in pairs.items()}
    assert words["train"] and words["held_out"]
    assert not words["train"] & words["held_out"]
    assert all(len(pair["source"]) >= 3 * LATE for pair in pairs["held_out"])
    lengths = sorted(len(pair["source"]) for pair in pairs["train"])
    assert lengths[0] < 3 * 3 * TOKENS[0] and lengths[-1] > 3 * LATE


def words_of(group):
    """The articles that prose is from, by their word; a cut first or last word does not count."""
    return {
        word
        for pair in group
        for word in pair["source"].rpartition("\n")[0].split()[1:-1]
        if word.startswith("word")
    }
