"""A phase of a run as one rank trains it: its streams, its batch, its windows.

step       0 ........ 11 | 12 ....... 23
phase      0             | 1
streams    order 0       | order 1, from its beginning       each phase reads in its own order
engine     the same weights and moments; accumulation and windows change at the border
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haloformer.configs.schema import Phase
from haloformer.data_pipeline.prefetch import TrainSource
from haloformer.launcher.engine import Engine, set_batch
from haloformer.launcher.task_base import AnyBatch, HeldOutSource, Task
from haloformer.launcher.topology import Topology
from haloformer.model.windows import set_windows

# Parts of a stream's identity that the next phase has of its own.
_CHANGES = ("seed", "global_batch")


@dataclass(frozen=True)
class OpenPhase:
    """A phase and its streams.

    Attributes:
        phase: Which one.
        train: This rank's part of its batches.
        held_out: Held-out data at its length and batch.
    """

    phase: Phase
    train: TrainSource[AnyBatch]
    held_out: HeldOutSource

    def close(self) -> None:
        """Let go of files and threads."""
        self.train.close()
        self.held_out.close()

    def state(self, cursors: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """What a checkpoint keeps: the phase, and where its streams stand.

        Args:
            cursors: The union of all ranks' ``train.state_dict()``.
        """
        number, identity = self.phase.number, self.train.identity()
        return {"phase": number, "identity": identity, "data": dict(cursors)}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Bring the streams to where a checkpoint was written.

        A checkpoint at the end of a phase belongs to that one; the next begins afresh.

        Raises:
            ValueError: If it is of other data or another batch; names what differs.
        """
        number = self.phase.number
        saved = state["phase"]
        if saved == number:
            self._check_identity(state["identity"], ignored=())
            self.train.load_state(state["data"])
        else:
            assert saved == number - 1, f"a checkpoint of phase {saved} in phase {number}"
            self._check_identity(state["identity"], ignored=_CHANGES)

    def _check_identity(self, saved: Mapping[str, str | int], ignored: Sequence[str]) -> None:
        now = self.train.identity()
        keys = sorted((now.keys() | saved.keys()) - set(ignored))
        changed = [key for key in keys if saved.get(key) != now.get(key)]
        if changed:
            raise ValueError(
                f"{self.train.facts.place}: {', '.join(changed)} changed since the checkpoint; "
                "resume with the data and the batch of the run, or start a new run without --resume"
            )


def open_phase(task: Task, phase: Phase, topology: Topology) -> OpenPhase:
    """Open the streams of a phase at their beginning."""
    train, held_out = task.open_streams(phase.config, topology, phase.number)
    return OpenPhase(phase, train, held_out)


def enter_phase(engine: Engine, phase: Phase, topology: Topology) -> None:
    """Bring an engine to the batch and the windows of a phase, between two optimizer steps."""
    set_batch(engine, phase.config, topology)
    set_windows(engine.module, phase.config.model, topology.tensor_group)
