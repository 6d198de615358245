"""What a reader gives of an annotated data set, and how its characters become tokens.

A span covers every token that holds a part of it:

    text     T h e   A n t l e r s        answer "Ant": characters 4 to 6
    tokens   The | _Ant | lers            token 1, with the blank before it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.tokenizers import Tokenizer


class Span(NamedTuple):
    """A part of a text, and what it belongs to: the number of a cluster, 0 for answers."""

    start: int
    stop: int  # one past its last character
    group: int = 0


@dataclass(frozen=True, slots=True)
class Annotated:
    """One example: its texts, the last of which is what spans count in.

    Attributes:
        segments: classification, coreference: text. questions: question, text. choices: query,
            candidates, documents.
        note: For JSON: ``id``; ``label`` (classification: its name, choices: number of the right
            candidate); ``answers`` (questions: texts); ``num_candidates`` (choices); what else
            scoring needs.
        spans: In characters of the last segment: answers, or mentions with their cluster.
    """

    segments: tuple[str, ...]
    note: dict[str, Any]
    spans: tuple[Span, ...] = field(default=())


def token_spans(
    text: str, ids: NDArray[np.int64], tokenizer: Tokenizer, spans: Sequence[Span]
) -> list[list[int]]:
    """Spans in tokens.

    Args:
        text: What ``ids`` encode.
        ids: int64 [n].
        tokenizer: What made them.
        spans: In characters, none of them empty.

    Returns:
        [first token, last token, group] of each, ascending; equal ones are one.
    """
    if not spans:
        return []
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF).astype(np.int64)
    byte_of = np.concatenate([[0], np.cumsum(widths)])  # of each character, [n + 1]
    ends = np.cumsum(tokenizer.byte_lengths(ids))  # one past each token's last byte
    assert ends[-1] == byte_of[-1], "the tokens are not those of the text"
    starts, stops, groups = (np.array(part, np.int64) for part in zip(*spans, strict=True))
    first = np.searchsorted(ends, byte_of[starts], side="right")
    last = np.searchsorted(ends, byte_of[stops] - 1, side="right")
    found = set(zip(first.tolist(), last.tolist(), groups.tolist(), strict=True))
    return [list(span) for span in sorted(found)]
