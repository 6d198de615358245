"""The folder of a run survives crashes at any byte."""

import json
import os
from pathlib import Path

from full_disk import full_disk
from haloformer.launcher.run_dir import Plan, RunDir


def test_a_plan_comes_back_as_written(tmp_path: Path) -> None:
    plan = Plan("abc", "sqlite:///x.db", "/artifacts", {"steps": 1}, 2, None)
    run_dir = RunDir(tmp_path)
    run_dir.write_plan(plan)
    assert run_dir.read_plan() == plan


def test_a_record_cut_short_is_left_out_and_later_records_are_dropped_on_resume(
    tmp_path: Path,
) -> None:
    run_dir = RunDir(tmp_path)
    for step in range(1, 5):
        run_dir.append_metrics({"step": step, "loss": 0.1 * step})
    with run_dir.metrics_file.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in run_dir.read_metrics()] == [1, 2, 3, 4]
    run_dir.cut_metrics(2)
    run_dir.append_metrics({"step": 3, "loss": 1.0})
    assert [r["step"] for r in run_dir.read_metrics()] == [1, 2, 3]
    # Losses are compared bit for bit: JSON must carry every bit.
    assert run_dir.read_metrics()[1]["loss"] == 0.1 * 2
    assert all(json.loads(line) for line in run_dir.metrics_file.read_text().splitlines())


def test_the_end_of_a_run_writes_the_records_that_a_full_disk_refused(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with full_disk(0):
        run_dir.append_metrics({"step": 1, "loss": 1.0})
    assert run_dir.read_metrics() == []
    run_dir.write_state("finished", 1)
    assert [r["step"] for r in run_dir.read_metrics()] == [1]


def test_ranks_of_an_earlier_start_are_forgotten(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.announce_rank(1)
    assert run_dir.rank_pids() == {1: os.getpid()}
    run_dir.create()
    assert run_dir.rank_pids() == {}


def test_a_rank_that_is_forgotten_while_ranks_are_listed_is_left_out(tmp_path: Path) -> None:
    """The launcher starts the ranks again while somebody else looks."""
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.announce_rank(0)
    (tmp_path / "ranks" / "1.pid").symlink_to("gone")  # listed, and not there when it is read
    assert run_dir.rank_pids() == {0: os.getpid()}


def test_the_state_is_unknown_until_it_is_written(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.read_state() is None
    run_dir.write_state("stopped", 7)
    assert run_dir.read_state() == ("stopped", 7)
