"""Accuracy and F1 of labels."""

from __future__ import annotations

from collections.abc import Sequence


def accuracy(answers: Sequence[int], labels: Sequence[int]) -> float:
    """Share of right answers, in percent.

    Args:
        answers: Numbers of labels.
        labels: The true ones, as many, at least one.
    """
    pairs = list(zip(answers, labels, strict=True))
    return 100.0 * sum(answer == label for answer, label in pairs) / len(pairs)


def f1_of_label(answers: Sequence[int], labels: Sequence[int], label: int) -> float:
    """F1 of one label against the others, in percent; 0 if it is neither given nor true.

    Args:
        answers: Numbers of labels.
        labels: The true ones, as many.
        label: The one that counts as found.
    """
    pairs = list(zip(answers, labels, strict=True))
    hits = sum(answer == true == label for answer, true in pairs)
    named = sum((answer == label) + (true == label) for answer, true in pairs)
    return 200.0 * hits / named if named else 0.0


def mean_f1(answers: Sequence[int], labels: Sequence[int], num_labels: int) -> float:
    """Mean of the F1 of all labels, in percent; of two, the F1 of the second ("true", "pos")."""
    if num_labels == 2:
        return f1_of_label(answers, labels, 1)
    return sum(f1_of_label(answers, labels, label) for label in range(num_labels)) / num_labels
