"""Where answers stand in a text: what the questions of TriviaQA and HotpotQA are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from haloformer.data_pipeline.annotated import Span
from haloformer.data_pipeline.examples import MAX_ANSWERS


def find_answers(text: str, answers: Sequence[str]) -> tuple[Span, ...]:
    """Every place where one of the answers stands as whole words, whatever its case.

    Args:
        text: Where to look.
        answers: What to look for; empty ones are passed over.

    Returns:
        The first 64, ascending: no row has more labels (AI2's script).
    """
    lowered = _lowered(text)
    found = {
        (start, start + len(answer))
        for answer in {_lowered(answer.strip()) for answer in answers} - {""}
        for start in _places(lowered, answer)
    }
    return tuple(Span(start, stop) for start, stop in sorted(found)[:MAX_ANSWERS])


def _places(text: str, answer: str) -> list[int]:
    """The first 64 places of one answer, which are more than enough to find the first of all."""
    places: list[int] = []
    at = text.find(answer)
    while at >= 0 and len(places) < MAX_ANSWERS:
        if not _joins(text, at) and not _joins(text, at + len(answer)):
            places.append(at)
        at = text.find(answer, at + 1)
    return places


def _joins(text: str, at: int) -> bool:
    """Whether a word goes on across a place between two characters."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _lowered(text: str) -> str:
    """In small letters, and as long as before: a few letters become two."""
    small = text.lower()
    if len(small) == len(text):
        return small
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)
