"""`haloformer export` on a real run: transformers computes what the run computed."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
import transformers
import yaml
from mlflow import MlflowClient
from tokenizers import Tokenizer as Engine

import hf_peers
from haloformer.data_pipeline.stream import EvalStream
from haloformer.launcher.cli import main
from haloformer.launcher.load_model import Found, find_checkpoint, load_found, load_run
from launcher_runs import TINY, haloformer, held_out, newest_run, runs_of, write_project

LED = {
    "kind": "led",
    "hidden_size": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_heads": 2,
    "decoder_heads": 3,
    "encoder_ffn_size": 32,
    "decoder_ffn_size": 40,
    "max_source_positions": 128,
    "max_target_positions": 32,
    "attention_window": [8, 16],
    "initializer_range": 0.3,
}
TRAIN = [
    *("train", "tiny.yaml", "steps=4", "checkpoint.every=2", "model.dilation=1"),
    *("tracking.log_model=true", "--ranks", "2"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two sequence-parallel ranks, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    done = haloformer(folder, TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def led_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of an LED on pairs, on one rank."""
    folder = tmp_path_factory.mktemp("led_project")
    pairs = [{"source": f"page {n} of the book " * 3, "target": f"page {n}"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    recipe = {**TINY, "model": LED, "data": {**TINY["data"], "target_len": 16}, "steps": 2}
    recipe["parallel"] = {"context": 1}
    (folder / "led.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--input", str(folder / "pairs.jsonl"), "--format", "pairs", "--tokenizer", "byte"]
    assert main(["prepare", *words, "--output", str(folder / "data")]) == 0
    done = haloformer(folder, ["train", "led.yaml", "tracking.log_model=true", "--ranks", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(autouse=True)
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(project)


def run_id() -> str:
    (run,) = runs_of(Path())
    return run.name


@contextlib.contextmanager
def damaged(found: Found):
    """One byte of a checkpoint is another while the block runs."""
    step = found.manifest.step
    name = f"checkpoints/step-{step:08d}/{found.manifest.files[0].name}"
    path = found.catalog.artifacts.local_path(name)
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        yield
    finally:
        path.write_bytes(whole)


def test_transformers_has_the_held_out_loss_of_the_run(tmp_path, capsys):
    assert main(["export", "latest", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert f"run {run_id()}, step 4" in output and "tokenizer: bytes (261 tokens)" in output
    peer = transformers.LongformerForMaskedLM.from_pretrained(tmp_path / "out").eval()
    trained = load_run("latest")
    config = trained.config
    stream = EvalStream(
        Path(config.data.eval),
        config.data,
        global_batch=config.batch.global_batch,
        data_rank=0,
        data_world=1,
        num_batches=config.eval.batches,
    )
    loss_sum, count = 0.0, 0
    for batch in stream:
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        chosen = torch.zeros_like(ids)
        for row, (places, real) in enumerate(
            zip(batch.global_positions, batch.global_mask, strict=True)
        ):
            chosen[row, places[real]] = 1
        with torch.no_grad():
            expected = trained.model(ids, mask, chosen).logits
            found = peer(ids, mask.long(), chosen).logits
        assert hf_peers.relative_error(found[mask], expected[mask]) < 1e-5
        labels = torch.from_numpy(batch.labels)
        loss_sum += float(
            torch.nn.functional.cross_entropy(
                found.flatten(0, 1), labels.flatten(), reduction="sum"
            )
        )
        count += int((labels != -100).sum())
    assert count > 0
    assert loss_sum / count == pytest.approx(held_out(newest_run(Path()))[4], rel=1e-5)


def test_the_tokenizer_comes_along_and_encodes_as_the_run_did(tmp_path):
    assert main(["export", run_id(), str(tmp_path / "out"), "--step", "2"]) == 0
    trained = load_run(run_id(), 2)
    text = "Grüße, <mask> \u2603\n  twice"
    ours = [0, *trained.tokenizer.encode(text).tolist(), 2]
    assert Engine.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == ours
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("Grüße")["input_ids"] == [0, *trained.tokenizer.encode("Grüße").tolist(), 2]
    assert (theirs.mask_token_id, theirs.pad_token_id, theirs.model_max_length) == (260, 1, 128)


def test_the_run_holds_its_model_as_mlflow_and_transformers_load_it(project):
    uri = f"sqlite:///{project}/mlflow.db"
    client, run = MlflowClient(uri), run_id()
    assert not (newest_run(project).path / "model").exists()  # sent, and not kept twice
    trained = load_run(run)
    ids = torch.randint(5, 250, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    expected = trained.model(ids, mask).logits
    mlflow.set_tracking_uri(uri)
    try:
        parts = mlflow.transformers.load_model(f"runs:/{run}/model", return_type="components")
        filler = mlflow.transformers.load_model(f"runs:/{run}/model")
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(filler, transformers.FillMaskPipeline)
    assert filler("word1 of <mask>ine 3")[0]["token_str"]
    assert (
        parts["tokenizer"]("Gr\u00fc\u00dfe").input_ids[1:-1]
        == trained.tokenizer.encode("Gr\u00fc\u00dfe").tolist()
    )
    folder = client.download_artifacts(run, "model/model")
    for peer in (parts["model"], transformers.AutoModelForMaskedLM.from_pretrained(folder)):
        theirs = peer.eval()(ids, mask).logits
        assert (theirs - expected)[mask.bool()].abs().max() < 1e-5


def test_an_led_run_holds_its_model_too(led_project):
    uri = f"sqlite:///{led_project}/mlflow.db"
    run = newest_run(led_project).path.name
    mlflow.set_tracking_uri(uri)
    try:
        parts = mlflow.transformers.load_model(f"runs:/{run}/model", return_type="components")
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(parts["model"], transformers.LEDForConditionalGeneration)


def test_the_step_that_is_named_is_the_one_that_is_written(tmp_path):
    weights = {}
    for step in (2, 4):
        target = tmp_path / str(step)
        assert main(["export", "latest", str(target), "--step", str(step)]) == 0
        peer = transformers.LongformerForMaskedLM.from_pretrained(target)
        weights[step] = peer.state_dict()["lm_head.dense.weight"]
        name = "model.head.dense.weight"
        assert torch.equal(weights[step], load_run("latest", step).model.state_dict()[name])
    assert not torch.equal(weights[2], weights[4])


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_step():
    newest = find_checkpoint("latest", None, None)
    assert newest.manifest.step == 4
    with damaged(newest):
        assert load_run("latest").step == 2
        with pytest.raises(ValueError, match=r"step 4 .* is damaged: .* leave out --step"):
            load_run(run_id(), 4)
    assert load_run("latest").step == 4


def test_a_run_outlives_its_data_by_the_tokenizer_among_its_artifacts(
    tmp_path, monkeypatch, capsys
):
    database = f"sqlite:///{Path('mlflow.db').resolve()}"
    data, artifacts = (
        Path("data").resolve(),
        find_checkpoint("latest", None, None).known.artifacts(),
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "latest", "kept"]) == 0
    tokenizer = artifacts.local_path("tokenizer")
    tokenizer.rename(tokenizer.with_name("elsewhere"))
    try:  # as a run of an older version: there is only the data
        capsys.readouterr()
        assert main(["export", "latest", "out"]) == 2
        error = capsys.readouterr().err
        assert "data/train, which is not there" in error and "--data" in error
        assert main(["export", "latest", "out", "--data", str(data / "eval")]) == 2
        assert "not the data that run" in capsys.readouterr().err
        assert not Path("out").exists()
        assert main(["export", "latest", "out", "--data", str(data / "train")]) == 0
    finally:
        tokenizer.with_name("elsewhere").rename(tokenizer)
    same = [Path(folder, "tokenizer.json").read_bytes() for folder in ("kept", "out")]
    assert same[0] == same[1]


def test_what_cannot_be_exported_is_a_sentence(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for words, message in (
        (["latest", str(tmp_path / "full")], "is there already and not empty"),
        (["latest", str(tmp_path / "out"), "--step", "3"], "no committed checkpoint at step 3"),
        (["0" * 32, str(tmp_path / "out")], "not found"),
        (["latest", str(tmp_path / "out"), "--experiment", "other"], "no committed checkpoint"),
    ):
        assert main(["export", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_led_run_writes_the_same_answers_as_its_export_in_transformers(
    led_project, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(led_project)
    assert main(["export", "latest", str(tmp_path / "out")]) == 0
    (tmp_path / "asked.txt").write_text("page 3 of the book\n")
    ask = ["--input", str(tmp_path / "asked.txt"), "--json", "--max-length", "12", "--beams", "3"]
    capsys.readouterr()
    for name in ("latest", str(tmp_path / "out")):
        assert main(["generate", name, *ask]) == 0
    answers = {json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()}
    peer = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("page 3 of the book", return_tensors="pt")["input_ids"]
    chosen = torch.zeros_like(ids)
    chosen[:, 0] = 1
    with torch.no_grad():
        call = {"input_ids": ids, "global_attention_mask": chosen, "labels": ids[:, :9]}
        found, ours = peer(**call).logits, load_run("latest").model(**call).logits
    assert hf_peers.relative_error(found, ours) < 1e-5
    written = peer.generate(ids, global_attention_mask=chosen, max_length=12, num_beams=3)
    assert answers == {tokenizer.decode(written[0], skip_special_tokens=True)}


def test_a_run_that_writes_no_text_is_not_asked(tmp_path, capsys):
    (tmp_path / "asked.txt").write_text("one\n")
    assert main(["generate", "latest", "--input", str(tmp_path / "asked.txt")]) == 2
    assert f"run {run_id()}, step 4: holds a MaskedLM" in capsys.readouterr().err


def test_a_char_lm_is_refused_by_name():
    found = find_checkpoint("latest", None, None)
    config = json.loads(json.dumps(found.manifest.config))
    sizes = ("hidden_size", "num_layers", "num_heads", "ffn_size", "max_positions")
    config["model"] = {
        "kind": "char_lm",
        "attention_window": 16,
        **{key: config["model"][key] for key in sizes},
    }
    other = replace(found, manifest=found.manifest.model_copy(update={"config": config}))
    with pytest.raises(ValueError, match="char_lm, which transformers has no model for"):
        load_found(other)
