"""The history of ``haloformer bench step`` and its gate, on made-up lines."""

import json

import pytest

from haloformer.launcher import bench_history

SPEED = "mlm 4096: tokens/s, 2 ranks"


def line(speed, device="a CPU", steps=3):
    return {
        "device": device,
        "settings": {"steps": steps, "ranks": (1, 2)},
        "ratios": {SPEED: speed},
    }


def written(lines, path):
    for entry in lines:
        bench_history.append(entry, path)
    return bench_history.read(path)


def test_a_ratio_below_085_of_the_median_of_the_last_five_is_worse(tmp_path):
    # 9.0 is the oldest of six and no longer counts.
    before = written([line(x) for x in (9.0, 4.0, 4.2, 1.0, 4.1, 4.4)], tmp_path / "h.jsonl")
    assert bench_history.regressions(line(0.86 * 4.1), before) == []
    (fault,) = bench_history.regressions(line(0.84 * 4.1), before)
    assert fault.startswith(f"{SPEED}: 3.44, below 0.85 x 4.10, the median of the last 5")


def test_other_devices_settings_and_names_do_not_count(tmp_path):
    others = [line(9.0, device="another CPU"), line(9.0, steps=1)]
    assert bench_history.regressions(line(1.0), written(others, tmp_path / "h.jsonl")) == []
    renamed = line(9.0) | {"ratios": {"led 16384: memory, 1 rank": 9.0}}
    assert bench_history.regressions(line(1.0), [renamed]) == []


def test_no_file_is_an_empty_history_and_a_strange_line_is_named(tmp_path):
    path = tmp_path / "h.jsonl"
    assert bench_history.read(path) == []
    path.write_text(json.dumps(line(1.0)) + "\n[]\n")
    with pytest.raises(ValueError, match=r"h.jsonl line 2 is no line of a history"):
        bench_history.read(path)


def test_a_line_has_ratios_of_which_larger_is_better():
    found = {
        "tokens_per_second, 2 ranks": 4.0,
        "step_growth_mib_per_rank, 2 ranks": 0.2,
        "seconds, 2 ranks over 1": 1.25,
    }
    rule = {"rule": "fast", "found": 4.0, "holds": True}
    entry = {
        "case": {"kind": "mlm", "tokens": 4096},
        "contenders": {"2 ranks": {}, "transformers": {}},
        "ratios": found,
        "must_hold": [rule],
    }
    report = {"device": "a CPU", "settings": {"steps": 3}, "command": "c", "cases": [entry]}
    made = bench_history.line_of(report)
    assert made["ratios"] == {
        SPEED: 4.0, "mlm 4096: memory, 2 ranks": 5.0, "mlm 4096: 2 ranks over 1": 0.8
    }  # fmt: skip
    assert made["must_hold"] == {"mlm 4096: fast": True}
    assert made["settings"]["cases"] == ["kind=mlm tokens=4096"] and made["command"] == "c"
