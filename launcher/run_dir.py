"""The folder of a run: its plan, its step records, the pids and beats of its ranks, its end.

All hosts of a run see it. What ranks and launcher tell each other while a run is going stands in
records of one fixed size that are overwritten in place: a shared filesystem shows a reader who
opens them the last ones, while a file that appears or is renamed may take it a minute.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from haloformer.configs.load import parse_config
from haloformer.configs.schema import TrainConfig
from haloformer.launcher.journal import Journal, records_of

State = Literal["running", "finished", "stopped"]

SCORES = "scores.json"  # what ranks that evaluate have found

_RECORD_BYTES = 128


@dataclass(frozen=True)
class Plan:
    """What the launcher tells every rank; written before any rank starts.

    Attributes:
        run_id: MLflow run.
        tracking_uri: MLflow tracking server or database.
        artifact_uri: Where the run's checkpoints are, so that no rank need ask the server.
        config: The recipe, as JSON.
        world_size: Ranks in all.
        resume_step: Step of the committed checkpoint to continue from, None for a fresh start.
        evaluation: What ranks that evaluate are to do (``evaluate_worker.Order``); None to train.
    """

    run_id: str
    tracking_uri: str
    artifact_uri: str
    config: dict[str, Any]
    world_size: int
    resume_step: int | None
    evaluation: dict[str, Any] | None = None

    def train_config(self) -> TrainConfig:
        """The recipe, validated."""
        return parse_config(self.config, "plan")


@dataclass(frozen=True)
class Orders:
    """What the launcher wants from the ranks.

    Attributes:
        attempt: The start of the ranks that it is for; ranks of another one end themselves.
        stop: Finish the step, write a checkpoint and end.
    """

    attempt: str
    stop: bool


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life.

    Attributes:
        attempt: The start that the rank belongs to.
        count: Beats so far; clocks of two hosts cannot be compared, this can.
        step: Steps done.
        code: Exit code of a rank that has come to its end, None before.
    """

    attempt: str
    count: int
    step: int
    code: int | None


class RunDir:
    """Paths and small files of ``runs/<run id>``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = Journal(self.metrics_file)

    def create(self) -> None:
        """Make the folder, and forget the ranks and the end of an earlier start."""
        (self.path / "ranks").mkdir(parents=True, exist_ok=True)
        self._state_file.unlink(missing_ok=True)
        for pid_file in (self.path / "ranks").iterdir():
            pid_file.unlink()

    @property
    def plan_file(self) -> Path:
        """JSON of the plan."""
        return self.path / "plan.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def curve_file(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def _state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def _orders_file(self) -> Path:
        return self.path / "orders.json"

    @property
    def staging(self) -> Path:
        """Where checkpoints are written before they are uploaded."""
        return self.path / "staging"

    def write_plan(self, plan: Plan) -> None:
        """Store the plan."""
        write_json_atomically(self.plan_file, asdict(plan))

    def read_plan(self) -> Plan:
        """The stored plan."""
        return Plan(**json.loads(self.plan_file.read_text(encoding="utf-8")))

    def announce_rank(self, rank: int) -> None:
        """Leave this process's id where the launcher looks for ranks to stop."""
        (self.path / "ranks" / f"{rank}.pid").write_text(str(os.getpid()), encoding="ascii")

    def rank_pids(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that have announced themselves."""
        pids = {}
        for file in sorted((self.path / "ranks").glob("*.pid")):
            with contextlib.suppress(FileNotFoundError):  # forgotten: the ranks start again
                text = file.read_text(encoding="ascii")
                if text:  # a rank may be writing it just now
                    pids[int(file.stem)] = int(text)
        return pids

    def write_orders(self, orders: Orders) -> None:
        """Tell the ranks."""
        _overwrite(self._orders_file, asdict(orders))

    def read_orders(self) -> Orders | None:
        """The orders, None while they are being written or before the first."""
        record = _read_record(self._orders_file)
        return None if record is None else Orders(**record)

    def write_beat(self, rank: int, beat: Beat) -> None:
        """Give a sign of life."""
        _overwrite(self.path / "ranks" / f"{rank}.beat", asdict(beat))

    def read_beats(self, attempt: str) -> dict[int, Beat]:
        """Rank -> its last beat in an attempt."""
        beats = {}
        for file in sorted((self.path / "ranks").glob("*.beat")):
            record = _read_record(file)
            if record is not None and record["attempt"] == attempt:
                beats[int(file.stem)] = Beat(**record)
        return beats

    def seconds_since_beat(self) -> float | None:
        """Age of the newest beat of a rank; infinite if all ended, None if none ever beat here."""
        files = list((self.path / "ranks").glob("*.beat"))
        records = [(file, _read_record(file)) for file in files]
        going = [file for file, record in records if record is None or record["code"] is None]
        if not files or not going:
            return math.inf if files else None
        return time.time() - max(file.stat().st_mtime for file in going)

    def write_state(self, state: State, step: int) -> None:
        """Say how far the run came and whether it goes on, after what waits to be recorded."""
        self._metrics.flush()
        write_json_atomically(self._state_file, {"state": state, "step": step})

    def read_state(self) -> tuple[State, int] | None:
        """The last state written, None before the first."""
        if not self._state_file.exists():
            return None
        record = json.loads(self._state_file.read_text(encoding="utf-8"))
        return record["state"], record["step"]

    def read_metrics(self) -> list[dict[str, Any]]:
        """All step records, oldest first; a line cut short by a crash is left out."""
        return records_of(self.metrics_file)

    def cut_metrics(self, step: int) -> None:
        """Drop the records after a step: what follows is about to be trained again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.metrics_file, text)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add the record of one step, now or as soon as the disk takes it."""
        self._metrics.add(record)


def write_json_atomically(path: Path, value: Any) -> None:
    """Replace a file by the JSON of a value; a reader sees the old one or the new one."""
    write_atomically(path, json.dumps(value, indent=1))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a text; a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _overwrite(path: Path, value: dict[str, Any]) -> None:
    record = json.dumps(value).ljust(_RECORD_BYTES - 1) + "\n"
    assert len(record) == _RECORD_BYTES, record
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, record.encode("ascii"), 0)
    finally:
        os.close(descriptor)  # a network filesystem sends it off here


def _read_record(path: Path) -> dict[str, Any] | None:
    """A record, None if there is none or it is being written."""
    try:
        text = path.read_text(encoding="ascii")
        return None if len(text) != _RECORD_BYTES else dict(json.loads(text))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
