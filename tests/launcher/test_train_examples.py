"""Tasks of annotated examples from the command line: trained, scored, exported, resumed."""

import json
import os
import random
import signal
from functools import cache
from pathlib import Path

import mlflow
import pytest
import torch
import transformers
import yaml

from example_data import LABELS, write_examples
from haloformer.launcher.cli import main
from haloformer.launcher.load_model import load_run
from launcher_runs import TINY, haloformer, held_out, losses, newest_run, start
from task_layouts import EXAMPLES

MODEL = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_size": 64,
    "max_positions": 64,
    "attention_window": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
}
COREF = {"max_span_width": 2, "num_antecedents": 8}
NUM_HELD_OUT = 16
METRICS = {
    "longformer_classifier": ("accuracy", "f1"),
    "longformer_qa": ("em", "f1"),
    "longformer_choice": ("accuracy",),
    "longformer_coref": ("conll_f1", "muc_f1", "b_cubed_f1", "ceaf_f1"),
}

KINDS = [
    "longformer_classifier",
    "longformer_qa",
    pytest.param("longformer_choice", marks=pytest.mark.extended),  # two commands more
    "longformer_coref",
]


def write_task(folder: Path, kind: str, **changes) -> None:
    """A recipe, and examples that it can learn."""
    lengths = random.Random(1)
    for name, count, seed in (("train", 64, 1), ("eval", NUM_HELD_OUT, 2)):
        texts = [lengths.randrange(8, 40) for _ in range(count)]
        write_examples(folder / "data" / name, EXAMPLES[kind], texts, seed=seed)
    recipe = {
        **TINY,
        "steps": 20,
        "model": {"kind": kind, **MODEL, **(COREF if kind == "longformer_coref" else {})},
        "data": {**TINY["data"], "seq_len": 64},
        "batch": {"global_batch": 8, "micro_batch": 8},
        "optim": {"learning_rate": 0.01, "warmup_steps": 2},
        "parallel": {"context": 1, "zero_stage": 1},
        "checkpoint": {"every": 20},
        "tracking": {"log_model": True},
        **changes,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """kind -> folder of a project with one run, and what the command said."""

    @cache
    def train(kind: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(kind)
        write_task(folder, kind)
        done = haloformer(folder, ["train", "tiny.yaml", "--ranks", "1"])
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, done.stdout

    return train


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_lowers_the_held_out_loss_and_beats_what_needs_no_model(
    trained, kind, monkeypatch, capsys
):
    folder, _ = trained(kind)
    found = held_out(newest_run(folder))
    assert sorted(found) == [0, 20] and found[20] < found[0] / 2
    assert all("cut_examples" in r for r in newest_run(folder).read_metrics() if "loss" in r)
    monkeypatch.chdir(folder)
    assert main(["evaluate", "latest", "--data", "data/eval", "--json", "scores.json"]) == 0
    table = capsys.readouterr().out
    record = json.loads((folder / "scores.json").read_text())
    assert record["count"] == len(record["examples"]) == NUM_HELD_OUT
    (first, model), (second, baseline) = record["scores"].items()
    assert first == "model" and second in table and tuple(model) == METRICS[kind]
    if kind == "longformer_coref":  # the baseline is given the mentions
        assert model["conll_f1"] > 30 and baseline["conll_f1"] == pytest.approx(100)
    else:
        assert model[METRICS[kind][0]] > 80 > baseline[METRICS[kind][0]]


def test_a_classifier_is_a_pipeline_of_transformers_that_knows_its_labels(
    trained, tmp_path, monkeypatch
):
    folder, said = trained("longformer_classifier")
    run = newest_run(folder).path.name
    assert f"mlflow.transformers.load_model('runs:/{run}/model')" in said
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    try:
        classify = mlflow.transformers.load_model(f"runs:/{run}/model")
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(classify, transformers.TextClassificationPipeline)
    assert classify.model.config.label2id == {name: n for n, name in enumerate(LABELS)}
    assert [one["label"] for one in classify(["wzyx wwz yx", "abca dab dc"])] == list(LABELS)
    monkeypatch.chdir(folder)
    (folder / "data" / "train").rename(folder / "data" / "gone")
    try:
        assert main(["export", "latest", str(tmp_path / "out")]) == 0  # the run kept its labels
    finally:
        (folder / "data" / "gone").rename(folder / "data" / "train")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}


def test_question_answering_is_exported_as_it_computes(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained("longformer_qa")[0])
    assert main(["export", "latest", str(tmp_path / "out")]) == 0
    peer = transformers.LongformerForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "abc abc ahgX bde"
    ids = torch.tensor([[0, *tokenizer("who?").input_ids[1:-1], 2, 2]])
    ids = torch.cat([ids, torch.tensor([tokenizer(text).input_ids[1:]])], 1)
    with torch.no_grad():
        theirs, ours = peer(ids), load_run("latest").model(ids)
    torch.testing.assert_close(ours.start_logits, theirs.start_logits, atol=1e-5, rtol=1e-5)
    assert int(theirs.start_logits.argmax()) == int(theirs.end_logits.argmax())
    assert tokenizer.decode(ids[0, int(theirs.start_logits.argmax())]) == "X"


def test_labels_in_another_order_are_refused(trained, tmp_path, monkeypatch, capsys):
    write_examples(tmp_path / "other", "classification", [8, 9], labels=LABELS[::-1])
    monkeypatch.chdir(trained("longformer_classifier")[0])
    assert main(["evaluate", "latest", "--data", str(tmp_path / "other")]) == 2
    assert "it has the labels good, bad, and run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS[2:])
def test_what_transformers_has_no_model_for_is_said_not_failed(
    trained, kind, tmp_path, monkeypatch, capsys
):
    folder, said = trained(kind)
    assert f"not logged: transformers has no model for a {kind}" in said
    monkeypatch.chdir(folder)
    assert main(["export", "latest", str(tmp_path / "out")]) == 2
    assert f"is a {kind}, which transformers has no model for" in capsys.readouterr().err


@pytest.mark.extended
def test_kill_9_then_resume_gives_the_same_coreference_losses_bit_for_bit(tmp_path):
    changes = {
        "parallel": {"context": 2, "zero_stage": 3},
        "checkpoint": {"every": 5},
        "tracking": {"log_model": False},
    }
    write_task(tmp_path, "longformer_coref", **changes)
    words = ["train", "tiny.yaml", "--ranks", "2"]
    done = haloformer(tmp_path, words)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = losses(newest_run(tmp_path))
    started = start(tmp_path, words)
    run_dir = started.wait_for_step(8)
    os.kill(run_dir.rank_pids()[1], signal.SIGKILL)
    assert started.finish()[0] == 1
    assert max(losses(run_dir)) < 20, "the run ended before it was killed"
    done = haloformer(tmp_path, [*words, "--resume", run_dir.path.name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run_dir) == whole
