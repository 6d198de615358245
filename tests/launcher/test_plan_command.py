"""``haloformer plan``: a forecast without torch, its JSON, and what it says of wrong input."""

import json
import subprocess
import sys

import pytest
import yaml

from haloformer.launcher.cli import main
from plan_recipes import VOCAB, recipe


@pytest.fixture
def path(tmp_path):
    raw = recipe(context=2, batch=8, precision="bf16")
    raw["phases"] = [
        {"name": "sequences-of-128", "steps": 3, "seq_len": 128},
        {"steps": 5, "learning_rate": 5e-5},
    ]
    del raw["steps"]
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_a_plan_has_every_phase_and_marks_the_recipes_layout(path, tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["plan", str(path), "--world", "8", "--gpus-per-node", "4", "--vocab", str(VOCAB)]
    assert main([*words, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "model, not measured" in printed and "rows 0-127 <-> [1] rows 128-255" in printed
    assert "\nsequences-of-128 " in printed
    report = json.loads(out.read_text())
    assert [(p["steps"], p["seq_len"]) for p in report["phases"]] == [(3, 128), (5, 256)]
    assert sum(one["is_recipe"] for one in report["layouts"]) == 1
    times = [one["step_seconds"] for one in report["layouts"]]
    assert times[:8] == sorted(times[:8])
    assert report["recipe"]["link_bytes"]["halo"]["node"] > 0
    assert [row["world"] for row in report["weak_scaling"]][-1] == 1024


def test_a_recipe_whose_tensor_ranks_sit_on_several_nodes_is_ranked_too(path, tmp_path):
    out = tmp_path / "plan.json"
    words = ["parallel.tensor=4", "parallel.context=1", "--world", "4", "--gpus-per-node", "2"]
    assert main(["plan", str(path), *words, "--vocab", str(VOCAB), "--json", str(out)]) == 0
    (own,) = [one for one in json.loads(out.read_text())["layouts"] if one["is_recipe"]]
    assert own["tensor"] == 4


def test_a_plan_needs_no_torch(path):
    words = ["plan", str(path), "--world", "2", "--vocab", str(VOCAB)]
    code = (
        "import sys; from haloformer.launcher.cli import main; "
        f"sys.exit(main({words!r}) or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world", "3", "--vocab", "9"], "is not a multiple of parallel.context"),
        (["--world", "4"], "--vocab"),
        (["--world", "4", "--vocab", "9", "--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--world", "4", "--vocab", "0"], "--vocab 0 is less than 1"),
        (["--world", "4", "--vocab", "9", "--globals", "-1"], "--globals -1 is no number"),
        (["--world", "4", "--vocab", "9", "--globals", "129"], "give 0 to 128"),
        (["--world", "4", "--vocab", "9", "--json", "no/p.json"], "there is no folder no"),
        (["--world", "4", "--vocab", "9", "--png", "no/p.png"], "there is no folder no"),
    ],
)
def test_wrong_input_is_named(words, said, path, capsys):
    assert main(["plan", str(path), *words]) == 2
    assert said in capsys.readouterr().err
