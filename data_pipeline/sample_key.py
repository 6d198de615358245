"""The name of a sample in a run."""

from __future__ import annotations

from typing import NamedTuple


class SampleKey(NamedTuple):
    """Which sample it is, and in which epoch it is read."""

    epoch: int
    shard: int
    sample: int
