"""Whatever is wrong with the input: one line that names it and the remedy, exit code 2, no rank."""

import shutil
import socket
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from haloformer.data_pipeline.index import load_index, load_table
from haloformer.launcher.cli import main
from haloformer.launcher.known_runs import read_known
from haloformer.launcher.launch import LocalCluster
from launcher_runs import TINY, haloformer, newest_run, write_project


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_project(folder)
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break things in, as the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command that must be refused; its one line of error."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("haloformer: error: ")
        assert error.count("\n") == 1, error
        return error

    return run


def recipe_without(project: Path, section: str, key: str) -> None:
    raw = yaml.safe_load(yaml.safe_dump(TINY))
    del raw[section][key]
    (project / "tiny.yaml").write_text(yaml.safe_dump(raw))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["setps=3"], "setps: unknown key (steps?)"),
        (["model.attention_window=15"], "attention_window 15 is odd"),
        (["model.num_heads=5"], "num_heads 5 does not divide hidden_size 32"),
        (["parallel.context=200"], "parallel.context 200 is more than data.seq_len 128"),
        (
            ["parallel.context=1", "parallel.tensor=4"],
            "parallel.tensor 4 does not divide model.num_heads 2; set parallel.tensor 2",
        ),
        (["batch.global_batch=3", "batch.micro_batch=2"], "batch.global_batch 3 is not a multiple"),
        (["data.train=nowhere"], "nowhere"),
        (["tracking.uri=sqlite:////proc/none/db"], "/proc/none/db cannot be used"),
        (["tracking.uri=sqlite:////proc"], "cannot be used (unable to open database file)"),
    ],
)
def test_a_fault_of_the_recipe_is_named(project: Path, refused, overrides, named: str) -> None:
    ranks = "200" if "parallel.context=200" in overrides else "2"
    assert named in refused("train", "tiny.yaml", *overrides, "--ranks", ranks)
    assert not (project / "runs").exists()


def test_a_missing_key_is_named(project: Path, refused) -> None:
    recipe_without(project, "model", "hidden_size")
    assert "model.hidden_size: missing key" in refused("train", "tiny.yaml")


def test_a_taken_port_is_named(project: Path, refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        error = refused("train", "tiny.yaml", "--master-port", port)
    assert f"--master-port {port}: Address already in use" in error


def test_a_port_that_is_taken_just_now_ends_the_run_as_failed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        monkeypatch.setattr(LocalCluster, "check", lambda *_: None)  # it was free a moment ago
        assert main(["train", "tiny.yaml", "--ranks", "2", "--master-port", port]) == 2
    known = read_known(newest_run(project).path)
    assert known is not None and known.mlflow_id is not None
    run = MlflowClient(known.tracking_uri).get_run(known.mlflow_id)
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_is_none_is_refused_with_the_limit(project: Path, refused, port) -> None:
    assert "a port from 1 to 65535" in refused("train", "tiny.yaml", f"--master-port={port}")


def test_checkpoints_that_do_not_fit_the_disk_are_refused_before_training(
    project: Path, refused
) -> None:
    sizes = ["model.hidden_size=65536", "model.ffn_size=262144", "model.num_layers=96"]
    error = refused("train", "tiny.yaml", *sizes)
    assert "free" in error and "GiB" in error
    assert not (project / "runs").exists()


def test_nothing_to_resume_is_said(project: Path, refused) -> None:
    assert "no committed checkpoint" in refused("train", "tiny.yaml", "--resume", "latest")
    assert "not found" in refused("train", "tiny.yaml", "--resume", "0123456789abcdef")
    assert "no run" in refused("checkpoints", "latest")


def test_shards_of_another_tokenizer_are_refused(project: Path, refused) -> None:
    done = haloformer(
        project,
        [
            *("prepare", "--input", "texts", "--format", "text", "--tokenizer", "train:300"),
            *("--output", "other"),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert "tokenizer" in refused("train", "tiny.yaml", "data.eval=other/eval")


def test_an_empty_input_is_refused(project: Path, refused) -> None:
    (project / "empty.txt").touch()
    arguments = ["--format", "text", "--tokenizer", "byte", "--output", "empty"]
    assert "empty.txt" in refused("prepare", "--input", "empty.txt", *arguments)
    assert not (project / "empty" / "train" / "index.json").exists()


def test_a_tar_cut_in_the_middle_is_refused_by_name(project: Path, refused) -> None:
    shard = next((project / "data" / "train").glob("*.tar"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    assert shard.name in refused("train", "tiny.yaml", "--ranks", "2")


def test_a_damaged_sample_is_found_by_a_rank_and_named(project: Path) -> None:
    """Same size, other bytes: only reading can tell, so the ranks are up when it is found."""
    shard = next((project / "data" / "train").glob("*.tar"))
    raw = bytearray(shard.read_bytes())
    for place in range(1024, len(raw), 2048):  # token data: the tar headers are elsewhere
        raw[place : place + 64] = bytes(64)
    shard.write_bytes(raw)
    done = haloformer(project, ["train", "tiny.yaml", "--ranks", "2"])
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line]
    assert any(shard.name in line and "sample" in line for line in errors), errors


def test_damaged_samples_that_may_be_skipped_are_counted(project: Path) -> None:
    index = load_index(project / "data" / "train")
    for number, shard in enumerate(index.shards):
        path = index.store.place(shard.name)
        raw = bytearray(Path(path).read_bytes())
        for offset in load_table(index, number)["offset"][::2]:
            raw[offset] ^= 1
        Path(path).write_bytes(raw)
    skip = ["data.on_corrupt=skip", "steps=12", "parallel.context=1", "checkpoint.every=12"]
    done = haloformer(project, ["train", "tiny.yaml", *skip, "--ranks", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    counted = [r["num_skipped"] for r in newest_run(project).read_metrics() if "loss" in r]
    assert counted == sorted(counted) and len(counted) == 12
    assert f"skipped: {counted[-1]:.0f} damaged" in done.stdout
    assert 0 < counted[-1] <= index.num_samples
