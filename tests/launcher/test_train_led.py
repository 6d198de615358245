"""An LED from pairs to ROUGE on real processes; killed and resumed bit for bit (extended)."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml

from haloformer.launcher.cli import main
from launcher_runs import TINY, haloformer, held_out, losses, newest_run, runs_of, start
from task_layouts import LED

RECIPE = {
    **TINY,
    "name": "tiny_led",
    "steps": 12,
    "model": {**LED, "max_source_positions": 128, "max_target_positions": 24},
    "data": {"train": "data/train", "eval": "data/eval", "seq_len": 128, "target_len": 24},
    "batch": {"global_batch": 2, "micro_batch": 1},
    "checkpoint": {"every": 4},
}
RANKS = ["--ranks", "2"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and pairs: a text of many lines, some too long, and its first word."""
    folder = tmp_path_factory.mktemp("led")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    with (folder / "pairs.jsonl").open("w") as file:
        for n in range(30):
            text = f"Word{n % 4} it is. " + " ".join(f"Line {i * i % 17}." for i in range(2 + n))
            file.write(json.dumps({"source": text, "target": f"word{n % 4}"}) + "\n")
    inputs = ["--input", str(folder / "pairs.jsonl"), "--format", "pairs", "--tokenizer", "byte"]
    assert main(["prepare", *inputs, "--holdout", "0.1", "--output", str(folder / "data")]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> dict[int, float]:
    """Losses of the run that nothing disturbs."""
    done = haloformer(project, ["train", "tiny.yaml", *RANKS])
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(newest_run(project))


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return project


def test_a_led_learns_and_counts_what_it_cuts(project: Path, whole: dict[int, float]) -> None:
    run_dir = newest_run(project)
    assert sorted(whole) == list(range(1, 13)) and whole[12] < whole[1]
    evaluated = held_out(run_dir)
    assert sorted(evaluated) == [0, 12] and evaluated[12] < evaluated[0]
    steps = [record for record in run_dir.read_metrics() if "loss" in record]
    # 12 steps of 2 are most of an epoch of 27 pairs, half of which are longer than 128 tokens.
    assert sum(record["cut_sources"] for record in steps) > 5
    assert all(record["cut_targets"] == 0 for record in steps)
    # A sequence-to-sequence loss gives no bits per character.
    assert all("bits_per_char" not in r and 0.0 < r["mfu_estimate"] < 1.0 for r in steps)
    assert run_dir.curve_file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.extended  # by default: test_phases.py resumes an LED, test_train.py kills a rank
def test_kill_9_of_a_rank_then_resume_gives_the_same_losses_bit_for_bit(
    project: Path, whole: dict[int, float]
) -> None:
    started = start(project, ["train", "tiny.yaml", *RANKS])
    run_dir = started.wait_for_step(6)
    os.kill(run_dir.rank_pids()[1], signal.SIGKILL)
    assert started.finish()[0] == 1
    assert max(losses(run_dir)) < 12, "the run ended before it was killed"
    done = haloformer(project, ["train", "tiny.yaml", *RANKS, "--resume", "latest"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 4" in done.stdout or "from step 8" in done.stdout
    assert losses(run_dir) == whole


def test_evaluate_scores_the_run_beside_its_baselines(
    here: Path, whole: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "latest", "--data", "data/eval", "--max-length", "8"]
    assert main([*command, "--json", "rouge.json"]) == 0
    table = capsys.readouterr().out
    record = json.loads((here / "rouge.json").read_text())
    assert record["step"] == 12 and record["run_id"] == newest_run(here).path.name
    assert len(record["pairs"]) == 3
    for name, scores in record["scores"].items():
        assert f"{name} " in table and f"{scores['rouge1']:.2f}" in table
    three = record["scores"]["first 3 sentences"]
    assert 0 < three["rouge1"] < 100 and three["words"] > 1
    for pair in record["pairs"]:
        assert pair["source"].lower().startswith(pair["target"])  # whole and as written
    assert any(len(pair["source"]) > 128 for pair in record["pairs"])


@pytest.fixture(scope="module")
def text(project: Path) -> Path:
    """A data set of documents."""
    for name in ("a.txt", "b.txt"):
        (project / name).write_text("text " * 50)
    inputs = ["--input", str(project / "a.txt"), str(project / "b.txt"), "--format", "text"]
    output = project / "text"
    options = ["--tokenizer", "byte", "--holdout", "0.5", "--output", str(output)]
    assert main(["prepare", *inputs, *options]) == 0
    return output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "data"], "holds no index.json"),
        (["--data", "text/eval"], "it holds documents, and this model is trained on pairs"),
        (["--data", "data/eval", "--max-length", "25"], "--max-length 25 is more than .* 24"),
        (["--data", "data/eval", "--step", "5"], "step 5"),
    ],
)
def test_evaluate_names_what_it_cannot_use(
    here: Path, text: Path, whole: dict[int, float], options: list[str], named: str, capsys
) -> None:
    capsys.readouterr()
    assert main(["evaluate", "latest", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(named, error), error


def test_text_is_refused_before_any_rank_starts(here: Path, text: Path, capsys) -> None:
    before = runs_of(here)
    assert main(["train", "tiny.yaml", "data.train=text/train", *RANKS]) == 2
    assert "text/train: it holds documents, and this model is" in capsys.readouterr().err
    assert runs_of(here) == before
