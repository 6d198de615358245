"""The page of a run says what each phase is."""

import os

from haloformer.configs.load import parse_config
from haloformer.launcher.run_page import _origin, _phase_table, lengths_of
from launcher_runs import TINY


def test_the_page_of_a_run_has_a_line_for_each_phase() -> None:
    phases = [
        {"steps": 8, "name": "short", "seq_len": 64, "attention_window": [8, 16]},
        {"steps": 8, "seq_len": 64, "global_batch": 8},
        {"steps": 8, "learning_rate": 0.001},
    ]
    config = parse_config({**TINY, "phases": phases}, "recipe")
    assert _phase_table(config)[2:] == [
        "| short | 8 | 4 | 64 | [8, 16] | 0.003 |",
        "| phase-1 | 8 | 8 | 64 | 16 | 0.003 |",
        "| phase-2 | 8 | 4 | 128 | 16 | 0.001 |",
    ]
    assert lengths_of(config) == "64 then 128"


def test_a_run_without_phases_is_one_line() -> None:
    config = parse_config(TINY, "recipe")
    assert _phase_table(config)[2:] == ["| tiny | 24 | 4 | 128 | 16 | 0.003 |"]
    assert lengths_of(config) == "128"


def test_a_user_who_has_a_number_and_no_name_is_told_by_it(monkeypatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_234_567)  # as containers are given
    assert _origin(["haloformer", "train"])["mlflow.user"] == "1234567"
