"""`haloformer bench step` trains the same model on both sides and reports what it saw."""

import dataclasses
import json
import math

import pytest
import torch
import transformers

from haloformer.configs.schema import LedConfig, ModelConfig, TrainConfig
from haloformer.launcher.bench_step_cases import REAL, TINY, is_promised, sweep
from haloformer.launcher.bench_step_contender import Contender, Setup, StepBenchError, no_room_for
from haloformer.launcher.bench_step_worker import Tokens
from haloformer.launcher.cli import main
from haloformer.model.hf_config import led_config, longformer_config


@pytest.fixture(autouse=True)
def threads():
    """The command imports what sets the threads of a process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", [*REAL.values(), *TINY.values()], ids=str)
def test_both_sides_have_the_same_sizes_and_the_same_dropout(case):
    mine = TrainConfig.model_validate(case.recipe(2)).model
    arguments = case.transformers_config()
    if case.kind == "mlm":
        raw = transformers.LongformerConfig(**arguments).to_dict()
        theirs, ignored = longformer_config(raw), {"layer_norm_eps", "recompute"}
        assert isinstance(mine, ModelConfig)
    else:
        raw = transformers.LEDConfig(**arguments).to_dict()
        theirs, ignored = led_config(raw), {"recompute"}
        assert isinstance(mine, LedConfig)
    assert raw["vocab_size"] == case.vocab
    left, right = (c.model_dump(exclude=ignored) for c in (mine, theirs))
    windows = left.pop("attention_window"), right.pop("attention_window")
    wanted = {windows[0]}
    assert {windows[1]} == wanted if isinstance(windows[1], int) else set(windows[1]) == wanted
    assert left == right


def test_the_real_sizes_are_those_of_the_promise():
    mlm, led = REAL["mlm"], REAL["led"]
    assert (mlm.tokens, mlm.layers, mlm.hidden, mlm.window) == (4096, 4, 768, 512)
    assert (led.tokens, led.targets, led.layers, led.window) == (16384, 256, 2, 1024)
    assert mlm.vocab == led.vocab == 50265 and led.recompute == "none"


def test_masked_tokens_are_about_15_percent_and_the_first_is_global():
    tokens = Tokens.of(REAL["mlm"])
    masked = (tokens.labels != -100).float().mean()
    assert tokens.ids[0, 0] == 0 and abs(float(masked) - 0.15) < 0.02


def test_a_sweep_is_from_1k_to_16k_and_only_the_promised_size_is_held_to_promises():
    lengths = {case.tokens: is_promised(case) for case in sweep(REAL["mlm"])}
    assert lengths == {1024: False, 2048: False, 4096: True, 8192: False, 16384: False}


def test_a_tiny_run_reports_both_sides_and_adds_to_the_history(tmp_path, capsys):
    file, history = tmp_path / "step.json", tmp_path / "history.jsonl"
    words = ["--cases", "led", "--size", "tiny", "--steps", "1", "--json", str(file)]
    words += ["--history", str(history), "--png", str(tmp_path / "step.png")]
    assert main(["bench", "step", *words]) == 0
    report = json.loads(file.read_text())
    assert report["parity"] == "ok" and all(e < 1e-4 for e in report["parity_errors"].values())
    (entry,) = report["cases"]
    assert entry["case"] == dataclasses.asdict(TINY["led"])
    rows = entry["contenders"]
    assert {name: len(row["peak_rss_mib"]) for name, row in rows.items()} == {
        "1 rank": 1, "2 ranks": 2, "transformers": 1
    }  # fmt: skip
    for row in rows.values():
        assert min(row["peak_rss_mib"]) > 10 and len(row["seconds_of_steps"]) == 1
        assert row["tokens_per_second"] == pytest.approx(144 / row["seconds_per_step"])
        # Fresh weights know nothing: the loss is that of guessing.
        assert row["loss"] == pytest.approx(math.log(97), abs=0.3)
    assert rows["1 rank"]["loss"] == pytest.approx(rows["2 ranks"]["loss"], rel=1e-5)
    speeds = [rows[role]["tokens_per_second"] for role in ("2 ranks", "transformers")]
    found = entry["ratios"]["tokens_per_second, 2 ranks"]
    assert found == pytest.approx(speeds[0] / speeds[1])
    printed = capsys.readouterr().out
    assert "led: 128 + 16 tokens" in printed and "tokens/s over transformers' >= 4" in printed
    assert "time of 2 ranks over 1 rank's <= 1.1" in printed
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    (line,) = (json.loads(row) for row in history.read_text().splitlines())
    assert line["ratios"]["led 128: tokens/s, 2 ranks"] == pytest.approx(found, abs=1e-4)


def test_a_contender_that_fails_or_hangs_is_told_and_nothing_is_reported():
    strange = dataclasses.replace(TINY["mlm"], heads=3)
    with (
        pytest.raises(StepBenchError, match=r"transformers: exit code 1: .*multiple of"),
        Contender(Setup("transformers"), strange),
    ):
        pass
    with (
        pytest.raises(StepBenchError, match="parity: not done after 0 s"),
        Contender(Setup("parity", seconds=0.01)),
    ):
        pass


def test_what_memory_will_not_hold_is_told_before():
    assert no_room_for(1.0) is None
    assert "needs about 1000000000 MiB" in no_room_for(1e9)


def test_bad_options_say_what_is_wrong(tmp_path, capsys):
    for options, message in (
        (["--cases", "gpt"], "--cases names 'gpt'; known are mlm, led"),
        (["--steps", "0"], "--steps is 0"),
        (["--json", str(tmp_path / "no" / "b.json")], "there is no folder"),
        (["--ranks", "2,2"], "--ranks takes different numbers"),
        (["--device", "cuda", "--ranks", "1000"], "1000 ranks needs a GPU each"),
    ):
        assert main(["bench", "step", *options]) == 2
        assert message in capsys.readouterr().err
