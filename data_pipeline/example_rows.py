"""Reads annotated examples and lays them out in rows: see ``examples`` for the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.examples import (
    MAX_ANSWERS,
    ExampleBatch,
    ExampleContent,
    ExampleKey,
    ExampleRow,
    no_label,
    stack_examples,
)
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Specials

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the texts of an example lie in its row before it is cut.

    Attributes:
        starts: int64 [k], position of the first token of each text.
        lengths: int64 [k], tokens of each text.
        num_candidates: How many texts behind the first are candidates.
    """

    starts: Ints
    lengths: Ints
    num_candidates: int

    @property
    def width(self) -> int:
        """Tokens of the row, with the last </s>."""
        return int(self.starts[-1] + self.lengths[-1]) + 1

    @property
    def num_globals(self) -> int:
        """Tokens before the first document, or <s> alone.

        Of a question without candidates not the </s> behind it, which transformers and AI2's
        script leave out: an exported model finds the same globals by itself.
        """
        first = 1 + self.num_candidates
        if first >= len(self.starts):
            return 1
        return int(self.starts[first]) - (1 if self.num_candidates else 2)

    @property
    def candidates(self) -> Ints:
        """Positions of the candidates' markers, int64 [num_candidates]."""
        return self.starts[1 : 1 + self.num_candidates] - 1


def lay_out(lengths: Sequence[int], num_candidates: int) -> Layout:
    """Place texts of so many tokens: <s> one, </s> </s> before the second, </s> before others."""
    sizes = np.array(lengths, np.int64)
    gaps = np.ones(len(sizes), np.int64)
    gaps[1:2] = 2
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Layout(np.cumsum(gaps) + before, sizes, num_candidates)


@dataclass(frozen=True, slots=True)
class ExampleMaker:
    """Reads examples of one kind.

    Attributes:
        reader: Where they are.
        specials: Ids of <s>, </s> and <pad>.
        content: Which kind.
        pad_multiple: Rows are padded to a multiple of it (the context-parallel size).
        has_globals: Whether rows have the globals of their kind.
    """

    reader: ShardReader
    specials: Specials
    content: ExampleContent
    pad_multiple: int
    has_globals: bool

    def make(self, key: ExampleKey, seq_len: int) -> ExampleRow:
        """Read one example.

        Args:
            key: Which one.
            seq_len: Most tokens of its row.

        Raises:
            CorruptSampleError: If its bytes are not the ones that were written.
        """
        stored = self.reader.note(key.shard, key.sample)
        layout = self._layout(stored)
        width = min(layout.width, seq_len)
        return ExampleRow(
            ids=self._ids(key, layout, width),
            num_globals=min(layout.num_globals, width) if self.has_globals else 0,
            labels=self._labels(stored, layout, width),
            candidates=layout.candidates[layout.candidates < width - 1],
            was_cut=width < layout.width,
            key=key,
        )

    def padding(self) -> ExampleRow:
        """A row without text, for a place that has no example."""
        nothing = np.empty(0, np.int64)
        return ExampleRow(nothing, 0, no_label(self.content), nothing, False, None)

    def stack(self, rows: Sequence[ExampleRow], sample_ids: Sequence[int]) -> ExampleBatch:
        """Stack rows, padded to the longest of them."""
        return stack_examples(
            rows,
            sample_ids,
            self.content,
            pad=self.specials.pad,
            pad_multiple=self.pad_multiple,
            has_globals=self.has_globals,
        )

    def whole_row(self, key: ExampleKey) -> Ints:
        """Ids of an example's row, not cut: int64 [n]."""
        layout = self._layout(self.reader.note(key.shard, key.sample))
        return self._ids(key, layout, layout.width)

    def annotation(self, key: ExampleKey) -> dict[str, Any]:
        """What is known of an example: see ``ExampleEvalStream.annotation``."""
        stored = self.reader.note(key.shard, key.sample)
        found = {name: value for name, value in stored["note"].items() if name != "num_candidates"}
        spans = self._spans(stored, self._layout(stored)).tolist()
        if self.content == "questions":
            found["answer_tokens"] = [[first, last] for first, last, _ in spans]
        elif self.content == "coreference":
            clusters: dict[int, list[list[int]]] = {}
            for first, last, cluster in spans:
                clusters.setdefault(cluster, []).append([first, last])
            found["clusters"] = [clusters[number] for number in sorted(clusters)]
        return found

    def segments(self, key: ExampleKey) -> list[Ints]:
        """Ids of each text of an example, as it was written: int64 [n_i]."""
        lengths = np.array(self.reader.note(key.shard, key.sample)["segments"], np.int64)
        tokens = self.reader.read(key.shard, key.sample, 0, int(lengths.sum()))
        return np.split(tokens.astype(np.int64), np.cumsum(lengths)[:-1])

    def _layout(self, stored: dict[str, Any]) -> Layout:
        return lay_out(stored["segments"], stored["note"].get("num_candidates", 0))

    def _ids(self, key: ExampleKey, layout: Layout, width: int) -> Ints:
        """The first ``width`` tokens of a row, the last of them </s>."""
        num_tokens = int(layout.lengths.sum())
        tokens = self.reader.read(key.shard, key.sample, 0, min(num_tokens, width))
        ids = np.full(width, self.specials.eos, np.int64)
        ids[0], taken = self.specials.bos, 0
        for start, length in zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True):
            kept = min(length, width - 1 - start)
            if kept < 0:
                break
            ids[start : start + kept] = tokens[taken : taken + kept]
            taken += length
        return ids

    def _labels(self, stored: dict[str, Any], layout: Layout, width: int) -> Ints:
        """The labels that lie in the first ``width`` tokens."""
        if self.content == "classification":
            return np.array(self.reader.index.labels.index(stored["note"]["label"]), np.int64)
        if self.content == "choices":
            right = stored["note"]["label"]
            is_there = layout.candidates[right] < width - 1
            return np.array(right, np.int64) if is_there else no_label(self.content)
        spans = self._spans(stored, layout)
        spans = spans[spans[:, 1] < width - 1]
        return spans if self.content == "coreference" else spans[:MAX_ANSWERS, :2]

    def _spans(self, stored: dict[str, Any], layout: Layout) -> Ints:
        """First token, last token and group of each span, in the row before it is cut: [k, 3]."""
        spans = np.array(stored["spans"], np.int64).reshape(-1, 3)
        spans[:, :2] += layout.starts[-1]
        return spans
