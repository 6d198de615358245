"""What pairs and annotated examples have in common: a name in a run, and rows that are padded."""

from __future__ import annotations

from typing import NamedTuple


class SampleKey(NamedTuple):
    """Which sample it is, and in which epoch it is read."""

    epoch: int
    shard: int
    sample: int


def padded(length: int, multiple: int) -> int:
    """The next multiple, at least one: every context rank holds a row."""
    return max(-(-length // multiple), 1) * multiple
