"""ROUGE of answers and of baselines that read nothing but the beginning of the source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

Scorer = Any  # rouge_score ships no types
KINDS = ("rouge1", "rouge2", "rougeL")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def sentences_of(text: str) -> list[str]:
    """The sentences of a text in order; lines that end in no full stop (headings) are left out."""
    found = []
    for line in text.splitlines():
        start = 0
        for end in _SENTENCE_END.finditer(line):
            found.append(line[start : end.end()].strip())
            start = end.end()
    return found


def lead_of_sentences(text: str, num_sentences: int) -> str:
    """The first sentences of a text."""
    return " ".join(sentences_of(text)[:num_sentences])


def lead_of_words(text: str, num_words: int) -> str:
    """As many first sentences as ``num_words`` words hold, but one at least."""
    kept: list[str] = []
    for sentence in sentences_of(text):
        num_words -= len(sentence.split())
        if kept and num_words < 0:
            break
        kept.append(sentence)
    return " ".join(kept)


def mean_rouge(
    scorer: Scorer, answers: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Mean F1 in percent of ROUGE-1, ROUGE-2 and ROUGE-L, words stemmed.

    Args:
        scorer: From ``open_scorer``.
        answers: What is scored.
        references: The true texts, one per answer.
    """
    scored = [
        scorer.score(target=reference, prediction=answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return {kind: 100.0 * fmean(score[kind].fmeasure for score in scored) for kind in KINDS}


def open_scorer() -> Scorer:
    """Google's rouge-score, which papers report.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        # An extra: training does not need it.
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(
            "rouge-score is missing; install it with: pip install 'haloformer[rouge]'"
        ) from error
    return RougeScorer(list(KINDS), use_stemmer=True)
