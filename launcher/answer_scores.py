"""Exact match and F1 of short answers, as the official scripts of the data sets compute them.

The scripts are single files beside the data, no packages; torchmetrics and ``evaluate`` carry the
one of SQuAD only, the latter fetched from a hub. They differ in two things:

    of The St. John's     "hotpotqa" (as SQuAD): st johns      "triviaqa": st john s
    F1 of no, no doubt    "hotpotqa": 0, it is yes or no       "triviaqa": 2/3
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Rules = Literal["hotpotqa", "triviaqa"]

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_MORE_PUNCTUATION = _PUNCTUATION | frozenset("\u2018\u2019\u00b4`")  # of TriviaQA's script
_CLOSED = ("yes", "no", "noanswer")


def normalized(answer: str, rules: Rules) -> str:
    """An answer as answers are compared: lower case, no punctuation, articles or double blanks."""
    text = answer.lower()
    if rules == "triviaqa":
        text = "".join(" " if letter in _MORE_PUNCTUATION else letter for letter in text)
    else:
        text = "".join(letter for letter in text if letter not in _PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def exact_match(answer: str, true_answers: Sequence[str], rules: Rules) -> float:
    """1.0 if an answer is one of the true ones, normalized; else 0.0."""
    mine = normalized(answer, rules)
    return float(any(mine == normalized(other, rules) for other in true_answers))


def word_f1(answer: str, true_answers: Sequence[str], rules: Rules) -> float:
    """Harmonic mean of precision and recall of words, 0 to 1; of the true answer that suits best.

    Args:
        answer: Of the model.
        true_answers: Ways to say the right one; none gives 0.
        rules: Whose.
    """
    mine = normalized(answer, rules)
    return max((_f1(mine, normalized(other, rules), rules) for other in true_answers), default=0.0)


def _f1(mine: str, other: str, rules: Rules) -> float:
    if rules == "hotpotqa" and mine != other and (mine in _CLOSED or other in _CLOSED):
        return 0.0
    mine_words, other_words = mine.split(), other.split()
    common = sum((Counter(mine_words) & Counter(other_words)).values())
    if common == 0:
        return 0.0
    return 2.0 * common / (len(mine_words) + len(other_words))
