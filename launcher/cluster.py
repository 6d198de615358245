"""What starting, watching and ending ranks needs from the machines they run on."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from haloformer.launcher.hosts import Host
from haloformer.launcher.run_dir import RunDir


class Meeting(NamedTuple):
    """Where rank 0 listens for the others."""

    address: str
    port: int


@dataclass(frozen=True)
class Answers:
    """Which hosts answer, in the order they were given, and why the others do not."""

    hosts: tuple[Host, ...]
    faults: dict[str, str]


class Cluster(Protocol):
    """One machine, machines behind ssh, or a SLURM allocation."""

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All that a run may use."""

    def check(self, used: Sequence[Host]) -> None:
        """See that hosts can take part, before anything starts.

        Raises:
            ValueError: Naming every host that cannot, and why.
        """

    def answering(self) -> Answers:
        """Ask every host that the run may use whether it can take part now."""

    def meeting(self, used: Sequence[Host]) -> Meeting:
        """An address and a free port of the first host."""

    def start(
        self, run_dir: RunDir, attempt: str, used: Sequence[Host], meeting: Meeting
    ) -> subprocess.Popen[bytes]:
        """Start the ranks; the process ends when all of them have."""

    def ask_stop(self, run_dir: RunDir, runner: subprocess.Popen[bytes]) -> None:
        """Hurry ranks that the orders ask to stop, where that is possible."""

    def look(
        self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]
    ) -> dict[str, set[int] | None]:
        """Per host, which of its ranks are alive; None where there is no answer."""

    def end(self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]) -> None:
        """End ranks at once, by process id, on every host that answers."""
