"""Records survive a disk that is full for a while."""

import resource
from pathlib import Path

import pytest

from full_disk import full_disk
from haloformer.launcher.journal import Journal, records_of
from haloformer.launcher.plot import write_curve
from haloformer.launcher.spool import Spool


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in records_of(path)]


@pytest.mark.parametrize("room", range(0, 32, 5))  # a line has 12 bytes
def test_records_that_a_full_disk_refused_are_written_once_and_in_order(tmp_path, room):
    path = tmp_path / "records.jsonl"
    journal = Journal(path)
    journal.add({"step": 1})
    with full_disk(path.stat().st_size + room):
        for step in range(2, 6):
            journal.add({"step": step})
        whole = room // 12  # with room for half a line that half is written
        assert steps_of(path) == list(range(1, 2 + whole))
    journal.add({"step": 6})
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


def test_flushing_writes_what_waits_and_the_fault_is_told_once(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    journal = Journal(path)
    with full_disk(0):
        for step in range(3):
            journal.add({"step": step})
        journal.flush()
    assert len(caplog.records) == 1
    assert str(path) in caplog.text and "wait in memory" in caplog.text
    journal.flush()
    assert steps_of(path) == [0, 1, 2]


def test_a_spool_behind_a_full_disk_goes_on(tmp_path):
    spool = Spool(tmp_path)
    with full_disk(0):
        spool.add_metrics(1, {"loss": 2.0})
    assert spool.pending(9) == []
    spool.add_status("FINISHED")
    assert [set(record.content) - {"time"} for record in spool.pending(9)] == [
        {"step", "metrics"},
        {"status"},
    ]


def test_a_curve_that_finds_no_room_is_a_sentence_and_no_file(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    records = [{"step": step, "loss": 1.0 / step} for step in range(1, 9)]
    with full_disk(1000):
        fault = write_curve(records, "a recipe", path)
    assert fault is not None and fault.startswith("not written: ")
    assert not path.exists()
    assert write_curve(records, "a recipe", path) is None and path.stat().st_size > 1000


def test_the_limit_is_given_back(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with full_disk(0), pytest.raises(OSError, match="too large"):
        (tmp_path / "file").write_text("x")
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
