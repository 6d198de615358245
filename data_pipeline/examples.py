"""Annotated examples as NumPy arrays: texts with a label, answers, a right candidate or clusters.

A row is laid out by the kind of the data, in at most ``seq_len`` tokens; what is longer loses its
end (the last token is always </s>), is counted in ``was_cut``, and loses the labels that lay there:

    classification   <s> text </s>                                             global: <s>
    questions        <s> question </s> </s> text </s>                          <s> question
    choices          <s> query </s> (</s> candidate)* (</s> document)* </s>    all before documents
    coreference      <s> text </s>                                             none

    choices, two candidates A and B, one document; a candidate's marker is the </s> before it:

    position    0    1    2    3   4    5   6    7    8   9   10
    token      <s>   q  </s> </s>  A  </s>  B  </s>   d   d  </s>
    global      x    x    x    x   x    x   x                        candidates [3, 5]

Globals as in Longformer (section 5); a coreference model has none there, and neither has ours,
whatever ``data.global_tokens`` says. With ``none`` no kind has any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.mlm import IGNORED
from haloformer.data_pipeline.samples import SampleKey, padded

ExampleContent = Literal["classification", "questions", "choices", "coreference"]
MAX_ANSWERS = 64  # occurrences of an answer in one row (AI2's script)
NO_SPAN = -1  # fills up labels and candidates that are positions
ExampleKey = SampleKey


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """One example before it is stacked; ``key`` is None on a row that only fills a place."""

    ids: NDArray[np.int64]  # [n]
    num_globals: int  # they are the first tokens of the row
    labels: NDArray[np.int64]  # [] or [k, 2 or 3], as one row of ``ExampleBatch.labels``
    candidates: NDArray[np.int64]  # [c]
    was_cut: bool
    key: ExampleKey | None


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Examples, b of them, N tokens wide, a multiple of ``pad_multiple``.

    Attributes:
        input_ids: int64 [b, N], <pad> behind each row.
        attention_mask: bool [b, N], False on padding.
        global_positions: int64 [b, G], ascending; G is at least 1 where the kind has globals.
        global_mask: bool [b, G], True on those that count.
        sample_ids: int64 [b], slot in the global batch.
        labels: int64. Classification: [b], number of the label, -100 in a row without an example.
            Questions: [b, A, 2], first and last token of every occurrence of an answer (none where
            the answer is not in the row). Choices: [b], number of the right candidate, -100 where
            there is none. Coreference: [b, S, 3], first token, last token, number of the cluster.
            -1 fills up; A and S are at least 1.
        candidates: int64 [b, C], positions of the candidates' markers, -1 fills up; C is 0 where
            the kind has no candidates.
        was_cut: bool [b], True where the row does not hold the whole text.
        keys: Which examples these are; None on rows that only fill a place.
        pad_multiple: What N is a multiple of (the context-parallel size).
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.bool_]
    global_positions: NDArray[np.int64]
    global_mask: NDArray[np.bool_]
    sample_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    candidates: NDArray[np.int64]
    was_cut: NDArray[np.bool_]
    keys: tuple[ExampleKey | None, ...]
    pad_multiple: int

    @property
    def num_tokens(self) -> int:
        """Tokens, padding left out."""
        return int(self.attention_mask.sum())

    @property
    def num_examples(self) -> int:
        """Rows that hold an example."""
        return sum(key is not None for key in self.keys)

    def split(self, micro_batch: int) -> Iterator[ExampleBatch]:
        """Cut into micro batches of ``micro_batch`` rows, each as narrow as its longest row."""
        for start in range(0, len(self.sample_ids), micro_batch):
            part = slice(start, start + micro_batch)
            mask, is_global = self.attention_mask[part], self.global_mask[part]
            width = padded(int(mask.sum(1).max()), self.pad_multiple)
            num_globals = max(_widest(is_global.sum(1)), min(is_global.shape[1], 1))
            yield ExampleBatch(
                self.input_ids[part, :width],
                mask[:, :width],
                self.global_positions[part, :num_globals],
                is_global[:, :num_globals],
                self.sample_ids[part],
                self.labels[part],
                self.candidates[part],
                self.was_cut[part],
                self.keys[part],
                self.pad_multiple,
            )


def stack_examples(
    rows: Sequence[ExampleRow],
    sample_ids: Sequence[int],
    content: ExampleContent,
    *,
    pad: int,
    pad_multiple: int,
    has_globals: bool,
) -> ExampleBatch:
    """Stack rows, padded to the longest of them.

    Args:
        rows: At least one; all of one kind.
        sample_ids: Slot of each in the global batch.
        content: What the rows are.
        pad: Id of <pad>.
        pad_multiple: The width becomes a multiple of it.
        has_globals: Whether rows of this stream have globals.
    """
    lengths = np.array([len(row.ids) for row in rows])
    width = padded(int(lengths.max()), pad_multiple)
    ids = np.full((len(rows), width), pad, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
    counts = np.array([row.num_globals for row in rows])
    places = np.arange(max(_widest(counts), 1) if has_globals else 0)
    is_global = places < counts[:, None]
    return ExampleBatch(
        input_ids=ids,
        attention_mask=np.arange(width) < lengths[:, None],
        global_positions=np.where(is_global, places, 0),
        global_mask=is_global,
        sample_ids=np.asarray(sample_ids, np.int64),
        labels=_filled([row.labels for row in rows], content in ("questions", "coreference")),
        candidates=_filled([row.candidates for row in rows], content == "choices"),
        was_cut=np.array([row.was_cut for row in rows], np.bool_),
        keys=tuple(row.key for row in rows),
        pad_multiple=pad_multiple,
    )


def no_label(content: ExampleContent) -> NDArray[np.int64]:
    """The labels of a row without an example, or without one that is left in it."""
    if content == "questions":
        return np.empty((0, 2), np.int64)
    if content == "coreference":
        return np.empty((0, 3), np.int64)
    return np.array(IGNORED, np.int64)


def _widest(counts: NDArray[np.int64]) -> int:
    return int(counts.max())


def _filled(parts: Sequence[NDArray[np.int64]], at_least_one: bool) -> NDArray[np.int64]:
    """Stack arrays that differ in their first dimension; scalars are just stacked."""
    if parts[0].ndim == 0:
        return np.stack(parts)
    longest = max(max(len(part) for part in parts), int(at_least_one))
    filled = np.full((len(parts), longest, *parts[0].shape[1:]), NO_SPAN, np.int64)
    for number, part in enumerate(parts):
        filled[number, : len(part)] = part
    return filled
