"""What every command does with faults that are nobody's input."""

import pytest

from full_disk import full_disk
from haloformer.launcher.cli import main


def test_a_file_or_a_disk_that_fails_is_one_line(tmp_path, capsys):
    folder = tmp_path / "folder.json"
    folder.mkdir()
    plan = ["plan", "enwiki_mlm", "--vocab", "261", "--world", "2", "--json"]
    with full_disk(100):
        assert main([*plan, str(tmp_path / "plan.json")]) == 1
    assert main([*plan, str(folder)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "haloformer: error: File too large",
        f"haloformer: error: {folder}: Is a directory",
    ]


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("haloformer.launcher.plan_command.run", broken)
    with pytest.raises(OSError, match="Bad file"):
        main(["plan", "enwiki_mlm", "--world", "2"])


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["plan", "enwiki_mlm"]) == 130
    assert capsys.readouterr().err == "haloformer: stopped\n"
