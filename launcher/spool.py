"""What a run has to tell MLflow, on the disk first: nothing is lost while the server is away.

    runs/<id>/spool.jsonl    one record per line, in the order in which things happened
              spool.sent     how far the server has it: | sent | sent | sent | not yet | not yet |
              spool.lock     held by the one process that sends                ^ offset in bytes

A crash between sending and noting it sends records twice. That is harmless: times stand in the
records, so a metric that comes twice is the same row, which MLflow's SQL stores keep once; tags,
parameters and the status are set to what they are already.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from haloformer.launcher.journal import Journal, parse_line, records_of

_OFFSET_DIGITS = 20

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Record(NamedTuple):
    """One line.

    Attributes:
        content: ``time`` (ms), and one of ``metrics`` with ``step``, ``params``, ``tags``,
            ``status``, or ``artifact`` (a file of the run's folder) with ``folder`` (its place).
            With ``phase``, a number, metrics are of that phase as well, and a status is its own;
            with ``name`` and ``params`` it begins.
        end: Offset behind the line.
    """

    content: dict[str, Any]
    end: int


class Spool:
    """The spool of one run.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file, self._sent = folder / "spool.jsonl", folder / "spool.sent"
        self._journal = Journal(self._file)

    def add_metrics(self, step: int, values: dict[str, float], phase: int | None = None) -> None:
        """Metrics of one step, of a phase if the run has several."""
        self._add({"step": step, "metrics": values}, phase)

    def add_params(self, values: dict[str, str]) -> None:
        """Parameters, which never change."""
        self._add({"params": values})

    def add_tags(self, values: dict[str, str]) -> None:
        """Tags."""
        self._add({"tags": values})

    def add_status(self, status: Status, phase: int | None = None) -> None:
        """What the run, or one of its phases, is doing, or how it ended."""
        self._add({"status": status}, phase)

    def add_phase(self, phase: int, name: str, params: dict[str, str]) -> None:
        """The beginning of a phase, once."""
        self._add({"name": name, "params": params}, phase)

    def add_artifact(self, path: Path, folder: str = ".") -> None:
        """A file in the run's folder, to be put into a folder of the artifacts."""
        self._add({"artifact": str(path.relative_to(self.folder)), "folder": folder})

    def phase_states(self) -> dict[int, Status]:
        """What was told of the phases that have begun: when the run ends, those that go on do."""
        states: dict[int, Status] = {}
        for content in records_of(self._file):
            phase, status = content.get("phase"), content.get("status")
            if phase is not None and "name" in content:
                states[phase] = "RUNNING"
            elif phase is not None and status is not None:
                states[phase] = status
            elif status is not None and status != "RUNNING":
                states |= {n: status for n, state in states.items() if state == "RUNNING"}
        return states

    def pending(self, limit: int) -> list[Record]:
        """The oldest records that are not marked as sent."""
        records: list[Record] = []
        offset = self._offset()
        try:
            with self._file.open("rb") as file:
                file.seek(offset)
                while len(records) < limit and (line := file.readline()).endswith(b"\n"):
                    offset += len(line)
                    content = parse_line(line)
                    if content is not None:
                        records.append(Record(content, offset))
        except FileNotFoundError:
            return []
        return records

    def mark(self, end: int) -> None:
        """Note that all is sent up to the end of a record."""
        descriptor = os.open(self._sent, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{end:0{_OFFSET_DIGITS}}".encode(), 0)
        finally:
            os.close(descriptor)

    def metrics_after(self, step: int) -> dict[int, dict[str, float]]:
        """Metrics of later steps by step, sent or not: what a run that goes on has told before."""
        told: dict[int, dict[str, float]] = {}
        for content in records_of(self._file):
            if content.get("step", step) > step:
                told.setdefault(content["step"], {}).update(content["metrics"])
        return told

    @contextlib.contextmanager
    def sending(self) -> Iterator[bool]:
        """Be the process that sends; False when another one is."""
        descriptor = os.open(self.folder / "spool.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def _add(self, content: dict[str, Any], phase: int | None = None) -> None:
        of_phase = {} if phase is None else {"phase": phase}
        self._journal.add({"time": int(time.time() * 1000), **of_phase, **content})

    def _offset(self) -> int:
        try:
            text = self._sent.read_bytes()
        except FileNotFoundError:
            return 0
        return int(text) if len(text) == _OFFSET_DIGITS and text.isdigit() else 0
