"""A checkpoint gets the same scores on any layout, and they are what they are said to be."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import launcher_runs
from dist import run_ranks
from evaluation_ranks import Case, export, plain_answers, stopped, walk, write
from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.index import load_index, load_table
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.tokenizers import ByteTokenizer
from haloformer.launcher.evaluate_char_lm import CharLmEvaluator
from haloformer.launcher.evaluate_command import table
from haloformer.launcher.evaluate_led import LedEvaluator
from haloformer.launcher.evaluate_mlm import MaskedLmEvaluator
from haloformer.launcher.evaluate_subject import open_subject, with_mesh
from haloformer.launcher.manifest import Manifest
from haloformer.launcher.summarizer import open_summarizer
from launcher_runs import TINY, haloformer
from task_layouts import NUM_PAIRS, write_data

KINDS = ("longformer_mlm", "char_lm", "led")
ALONE = [Case(kind) for kind in KINDS]
CASES = [
    *(Case(kind, data=2) for kind in KINDS),
    Case("longformer_mlm", context=2),
    Case("longformer_mlm", tensor=2),
    Case("char_lm", tensor=2),
    Case("led", context=2),
]
LIMITED = [Case("longformer_mlm", limit=3), Case("char_lm", limit=5), Case("led", limit=3)]
LIMITED_2 = [Case(case.kind, data=2, limit=case.limit) for case in LIMITED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def losses(folder):
    """What training's own evaluation says of each checkpoint."""
    return run_ranks(1, write, str(folder))[0]


@pytest.fixture(scope="module")
def outcomes(folder, losses):
    (alone,) = run_ranks(1, walk, [*ALONE, *LIMITED], str(folder))
    both = run_ranks(2, walk, [*CASES, *LIMITED_2], str(folder))
    assert both[0] == both[1], "ranks disagree"
    return alone | both[0]


@pytest.mark.parametrize("case", [*CASES, *LIMITED_2], ids=str)
def test_scores_and_records_equal_those_of_one_rank(outcomes, case):
    found, wanted = outcomes[str(case)], outcomes[str(Case(case.kind, limit=case.limit))]
    assert found["count"] == wanted["count"] > 0
    assert found["records"] == wanted["records"]
    assert found["scores"].keys() == wanted["scores"].keys()
    for candidate, values in found["scores"].items():
        assert values == pytest.approx(wanted["scores"][candidate], rel=1e-6)


def test_a_longformer_gets_what_training_logs_and_every_masked_token_counts(outcomes, losses):
    outcome = outcomes["longformer_mlm_dp1_cp1_tp1"]
    scores = outcome["scores"]["model"]
    assert scores["nats_per_token"] == pytest.approx(losses["longformer_mlm"], rel=1e-6)
    # A byte is a character here.
    assert scores["bits_per_char"] == pytest.approx(scores["nats_per_token"] / math.log(2))
    assert 0.0 <= scores["accuracy"] < 100.0
    assert 20 < outcome["count"] < 80  # 15 % of 286


def test_every_character_of_a_stream_is_scored_once_and_work_is_spared(outcomes):
    outcome = outcomes["char_lm_dp1_cp1_tp1"]
    num_tokens = sum(1 + 5 * n for n in range(NUM_PAIRS))
    assert outcome["count"] == num_tokens
    facts = outcome["facts"]
    # <s>, and </s> behind each document; windows of 40 that move on by 8.
    assert facts["stream_tokens"] == 1 + num_tokens + NUM_PAIRS
    assert facts["windows"] == 1 + math.ceil((facts["stream_tokens"] - 40) / 8)
    assert facts["token_layers_of_whole_windows"] == facts["windows"] * 40 * 2
    # Layers look 2 and 10 * 3 rows back, the full 32 of what a window keeps: nothing comes twice.
    assert facts["token_layers_computed"] == facts["stream_tokens"] * 2
    # The second of two ranks begins with the context of its first window.
    again = outcomes["char_lm_dp2_cp1_tp1"]["facts"]["token_layers_computed"]
    assert facts["token_layers_computed"] < again <= facts["token_layers_computed"] + 2 * 40


def test_an_led_writes_what_it_writes_under_transformers_call(folder, outcomes):
    outcome = outcomes["led_dp1_cp1_tp1"]
    assert outcome["count"] == NUM_PAIRS
    answers = [record["answer"] for record in outcome["records"]]
    assert answers == run_ranks(1, plain_answers, str(folder))[0]
    assert any(answers)
    means = [record["scores"]["model"]["words"] for record in outcome["records"]]
    assert outcome["scores"]["model"]["words"] == pytest.approx(sum(means) / NUM_PAIRS)


def test_a_limit_keeps_the_first_ones(outcomes):
    led = outcomes["led_dp1_cp1_tp1_limit3"]
    assert led["records"] == outcomes["led_dp1_cp1_tp1"]["records"][:3]
    assert outcomes["char_lm_dp1_cp1_tp1_limit5"]["count"] < 40 + 4 * 8
    mlm = outcomes["longformer_mlm_dp1_cp1_tp1_limit3"]
    assert mlm["count"] < outcomes["longformer_mlm_dp1_cp1_tp1"]["count"]


def test_all_ranks_stop_together_when_one_is_asked_to(folder):
    assert run_ranks(2, stopped, str(folder)) == [2, 2]


def test_a_checkpoint_is_evaluated_with_the_windows_of_the_phase_that_made_it(
    folder, losses, monkeypatch
):
    monkeypatch.chdir(folder)
    subject = open_subject("char-lm", None, None, "char_lm")
    assert subject.name == "run char-lm, step 3"
    assert subject.config.model.attention_window == [4, 20] and not subject.config.phases


def test_scores_that_cannot_be_logged_are_told_and_not_lost(folder, losses, monkeypatch):
    monkeypatch.chdir(folder)
    subject = open_subject("char-lm", None, None, "char_lm")
    gone = {"tracking_uri": "sqlite:////proc/nowhere/mlflow.db", "mlflow_id": "0" * 32}
    found = replace(subject.found, known=replace(subject.found.known, **gone))
    said = replace(subject, found=found).log({"model": {"bits_per_char": 1.0}})
    assert said.startswith("not logged to MLflow (tracking store sqlite:////proc/nowhere")


@pytest.mark.parametrize("chosen", ["first", "none"])
def test_an_led_answers_with_the_global_token_it_was_trained_with(
    folder, losses, tmp_path, monkeypatch, chosen
):
    (tmp_path / "runs").symlink_to(folder / "runs")  # beside no data of the run's name
    monkeypatch.chdir(tmp_path)
    (path,) = (folder / "runs" / "led" / "artifacts").rglob("manifest.json")
    text = path.read_text()
    manifest = Manifest.from_text(text)
    data = {**manifest.config["data"], "global_tokens": chosen}
    config = {**manifest.config, "data": data}
    path.write_text(manifest.model_copy(update={"config": config}).to_text())
    try:
        summarizer = open_summarizer("led", None, None, None)
    finally:
        path.write_text(text)
    assert summarizer.has_globals == (chosen == "first")


def test_the_command_scores_a_transformers_folder_on_two_ranks(folder, losses):
    (alone,) = run_ranks(1, export, str(folder))
    # The recipe's sequences have 47 tokens, the model reads 48: other cuts, other masks.
    assert alone["scores"]["model"]["nats_per_token"] == pytest.approx(
        losses["longformer_mlm"], rel=0.2
    )
    command = ["evaluate", "hf", "--data", "char_lm", "--ranks", "2", "--json", "found.json"]
    done = haloformer(folder, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not logged: a folder has no run" in done.stdout and "tokens" in done.stderr
    record = json.loads((folder / "found.json").read_text())
    assert record["folder"] == str(folder / "hf") and record["count"] == alone["count"]
    assert record["scores"]["model"] == pytest.approx(alone["scores"]["model"], rel=1e-6)
    for value in record["scores"]["model"].values():
        assert f"{value:.4f}" in done.stdout
    assert not list((folder / "runs").glob(".evaluate-*"))


def test_a_failed_evaluation_leaves_nothing(folder, losses):
    shutil.copytree(folder / "char_lm", folder / "damaged")
    index = load_index(folder / "damaged")
    path = Path(index.store.place(index.shards[0].name))
    raw = bytearray(path.read_bytes())
    raw[load_table(index, 0)["offset"][0]] ^= 1
    path.write_bytes(raw)
    done = haloformer(folder, ["evaluate", "char-lm", "--data", "damaged", "--ranks", "1"])
    assert done.returncode == 2 and "the evaluation failed" in done.stderr, done.stderr
    assert not list((folder / "runs").glob(".evaluate-*"))


def test_ctrl_c_ends_all_ranks_and_leaves_nothing(folder, losses):
    text = "many words in a line " * 150
    (folder / "long").mkdir()
    with DatasetWriter(folder / "long", ByteTokenizer(), 10_000) as writer:
        writer.add(text, ByteTokenizer().encode(text), "one document")
        writer.close()
    # As many turns as characters, a second at least for every hundred of them.
    options = ["--length", "30", "--stride", "1", "--ranks", "2", "--json", "never.json"]
    command = ["evaluate", "char-lm", "--data", "long", *options]
    process = subprocess.Popen(
        launcher_runs.command(command), cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if re.match(r"\d+/\d+ tokens", line):
            break
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 3  # the runner and its two ranks
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=launcher_runs.LIMIT_S)[0]
    assert process.returncode == 130, said
    assert "ending; once more ends the ranks at once" in said and "nothing was scored" in said
    assert "Traceback" not in said and "collective failed" not in said
    assert not psutil.wait_procs(ranks, timeout=60)[1], "ranks are left behind"
    assert not (folder / "never.json").exists()
    assert not list((folder / "runs").glob(".evaluate-*"))


@pytest.mark.parametrize(
    ("evaluator", "ranks", "sizes"),
    [
        (MaskedLmEvaluator(), None, (4, 2)),
        (MaskedLmEvaluator(), 16, (4, 2)),
        (MaskedLmEvaluator(), 4, (2, 2)),
        (MaskedLmEvaluator(), 3, (1, 1)),
        (LedEvaluator(), 8, (4, 1)),
        (CharLmEvaluator(), 8, (1, 2)),
        (CharLmEvaluator(), None, (1, 2)),
    ],
)
def test_ranks_share_a_sequence_as_the_recipe_has_it_as_far_as_they_can(evaluator, ranks, sizes):
    recipe = {**TINY, "parallel": {"context": 4, "tensor": 2}}
    parallel = with_mesh(TrainConfig.model_validate(recipe), evaluator, ranks).parallel
    assert (parallel.context, parallel.tensor) == sizes


def test_a_table_has_a_column_per_metric_as_wide_as_its_name():
    text = table(
        {"model": {"f1": 1.25, "bits_per_char": 7.0}, "none": {"f1": 50.0, "bits_per_char": 0.5}}, 2
    )
    assert text.splitlines() == [
        "            f1  bits_per_char",
        "model     1.25           7.00",
        "none     50.00           0.50",
    ]
