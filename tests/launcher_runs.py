"""Helpers for tests that run the real command line on a small real data set."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from haloformer.launcher.run_dir import RunDir

LIMIT_S = 300.0

TINY = {
    "name": "tiny",
    "seed": 3,
    "steps": 24,
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_size": 64,
        "max_positions": 128,
        "attention_window": 16,
        "dilation": [1, 2],
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "data": {"train": "data/train", "eval": "data/eval", "seq_len": 128},
    "batch": {"global_batch": 4, "micro_batch": 1},
    "optim": {"learning_rate": 0.003, "warmup_steps": 4, "schedule": "polynomial"},
    "parallel": {"context": 2, "zero_stage": 1},
    "checkpoint": {"every": 8},
    "eval": {"batches": 2},
    "tracking": {"log_model": False},  # seconds at the end of every run; test_export_command does
}


def write_project(folder: Path) -> None:
    """A recipe and a prepared data set of a few dozen small documents."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        words = [f"word{(number * 7 + i * i) % 23} of line {i}" for i in range(20 + number)]
        (texts / f"{number:02}.txt").write_text(f"Document {number}.\n" + "\n".join(words))
    done = haloformer(
        folder,
        [
            *("prepare", "--input", "texts", "--format", "text", "--tokenizer", "byte"),
            *("--output", "data"),
        ],
    )
    assert done.returncode == 0, done.stderr


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "haloformer.launcher.cli", *arguments]


def haloformer(
    folder: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(arguments), cwd=folder, env=_environment(variables), capture_output=True,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip


@dataclass
class Started:
    """A command that is running, and the runs that were there before it."""

    process: subprocess.Popen[str]
    folder: Path
    before: set[Path]

    def run_dir(self) -> RunDir | None:
        """The run that this command made, None before it has."""
        new = runs_of(self.folder) - self.before
        return RunDir(new.pop()) if new else None

    def wait_for_step(self, step: int, continued: RunDir | None = None) -> RunDir:
        """Wait until a step of training is recorded; fails when the command ends before.

        Args:
            step: To wait for; it must come after those recorded when the command was started.
            continued: The run, if the command continues one.
        """
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            run_dir = self.run_dir() if continued is None else continued
            if run_dir is not None and max(losses(run_dir), default=0) >= step:
                return run_dir
            if self.process.poll() is not None:
                raise AssertionError(f"ended early: {self.finish()}")
            time.sleep(0.01)  # a poll interval; nothing depends on its length
        self.process.kill()
        raise AssertionError(f"no step {step} after {LIMIT_S} s: {self.finish()}")

    def wait_for_ranks(self, run_dir: RunDir, other_than: Mapping[int, int]) -> dict[int, int]:
        """Wait until all ranks are there again, as other processes: their ids."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            pids = run_dir.rank_pids()
            if pids.keys() == other_than.keys() and not set(pids.items()) & set(other_than.items()):
                return pids
            if self.process.poll() is not None:
                raise AssertionError(f"ended early: {self.finish()}")
            time.sleep(0.01)  # a poll interval; nothing depends on its length
        self.process.kill()
        raise AssertionError(f"no new ranks after {LIMIT_S} s: {self.finish()}")

    def finish(self) -> tuple[int, str]:
        """Wait for the end: exit code and output; the command is ended if it hangs."""
        try:
            output, _ = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, output


def start(
    folder: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> Started:
    """Start a command and leave it running."""
    before = runs_of(folder)
    process = subprocess.Popen(
        command(arguments), cwd=folder, env=_environment(variables), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return Started(process, folder, before)


def runs_of(folder: Path) -> set[Path]:
    """Folders of all runs started so far."""
    return {path for path in (folder / "runs").glob("*") if not path.name.startswith(".")}


def newest_run(folder: Path) -> RunDir:
    """The run that was started last."""
    return RunDir(max(runs_of(folder), key=lambda path: path.stat().st_mtime_ns))


def losses(run_dir: RunDir) -> dict[int, float]:
    """Training loss by step."""
    return {r["step"]: r["loss"] for r in run_dir.read_metrics() if "loss" in r}


def held_out(run_dir: RunDir) -> dict[int, float]:
    """Held-out loss by step."""
    return {r["step"]: r["eval_loss"] for r in run_dir.read_metrics() if "eval_loss" in r}


def _environment(variables: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return {**inherited, "OMP_NUM_THREADS": "1", **({} if variables is None else variables)}
