"""`haloformer doctor` says what is wrong and what to do."""

import pytest

from haloformer.launcher.cli import main


def test_a_machine_that_can_train_is_well(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for subject in ("python", "torch", "deepspeed", "memory", "disk", "loopback", "tracking"):
        assert f"ok    {subject}" in output
    assert output.endswith("all well\n")


def test_a_tracking_server_that_is_not_there_is_named_with_the_remedy(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    assert main(["doctor"]) == 2
    output = capsys.readouterr().out
    assert "FAIL  tracking" in output
    assert "unset tracking.uri" in output
