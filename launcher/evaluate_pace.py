"""How far all ranks of an evaluation are, and whether they were asked to stop."""

from __future__ import annotations

import contextlib
from typing import Self

import torch
import torch.distributed as dist

from haloformer.launcher.counting import CountProgress
from haloformer.launcher.pulse import Pulse
from haloformer.launcher.topology import Topology
from haloformer.launcher.trainer import StopRequest


class EvaluationStoppedError(Exception):
    """All ranks were asked to stop, and do."""


class Pace:
    """Keeps the ranks of an evaluation together; rank 0 shows how far they are.

    Use as a context, then ``begin`` and ``advance``.

    Args:
        topology: Of the ranks.
        stop: Set when this rank is asked to stop.
        pulse: Of this rank, None where nobody watches.
    """

    def __init__(self, topology: Topology, stop: StopRequest, pulse: Pulse | None) -> None:
        self._topology, self._stop, self._pulse = topology, stop, pulse
        self._progress: CountProgress | None = None
        self._shown = contextlib.ExitStack()
        self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def begin(self, unit: str, total: int) -> None:
        """Say what is counted, and how much there is over all ranks."""
        if self._topology.rank == 0:
            every = max(1, total // 20)
            self._progress = self._shown.enter_context(CountProgress(unit, total, every))

    def advance(self, num_done: int) -> None:
        """Say that this rank has done so many more: one small sum over all ranks.

        Every rank calls it equally often. Ranks that see the same examples count them once:
        what context and tensor ranks other than the first say is not looked at.

        Raises:
            EvaluationStoppedError: On all ranks alike, when one was asked to stop.
        """
        topology = self._topology
        counts = topology.context_rank == 0 and topology.tensor_rank == 0
        agreed = torch.tensor([int(self._stop.asked), num_done if counts else 0])
        dist.all_reduce(agreed, group=topology.control_group)
        asked, done = agreed.tolist()
        self.done += done
        if self._pulse is not None:
            self._pulse.at_step(self.done)
        if self._progress is not None:
            self._progress.show(self.done)
        if asked:
            raise EvaluationStoppedError
