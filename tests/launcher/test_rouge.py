"""The baselines take the first sentences, and the scores are rouge-score's."""

import pytest

from haloformer.launcher.rouge import (
    lead_of_sentences,
    lead_of_words,
    mean_rouge,
    open_scorer,
    sentences_of,
)

TEXT = 'History\n\nAnts dig. They "eat." Do they sleep? No\nList item\nBees (too) fly.'


def test_sentences_end_in_a_stop_and_headings_are_none() -> None:
    assert sentences_of(TEXT) == ["Ants dig.", 'They "eat."', "Do they sleep?", "Bees (too) fly."]


def test_leads_are_whole_sentences() -> None:
    assert lead_of_sentences(TEXT, 1) == "Ants dig."
    assert lead_of_words(TEXT, 4) == 'Ants dig. They "eat."'
    assert lead_of_words(TEXT, 1) == "Ants dig."
    assert lead_of_words("No sentence", 5) == ""


def test_rouge_is_a_percentage_of_f1() -> None:
    scorer = open_scorer()
    assert mean_rouge(scorer, ["a b c d"], ["a b c d"]) == pytest.approx(
        {"rouge1": 100, "rouge2": 100, "rougeL": 100}
    )
    # 2 of 2 words found, 2 of 4 covered: F1 = 2/3; the other pair shares nothing.
    scores = mean_rouge(scorer, ["ants dig", "x"], ["ant digs big holes", "y"])
    assert scores == pytest.approx({"rouge1": 100 / 3, "rouge2": 25, "rougeL": 100 / 3})
