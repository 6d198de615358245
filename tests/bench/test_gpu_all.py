"""`make bench-gpu` runs what there is, and says so where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import gpu_all

from haloformer.launcher.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes")
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu_all.main() == 2
    assert capsys.readouterr().out == "no CUDA GPU found: bench-gpu has nothing to measure here\n"


def test_kernels_and_steps_run_in_both_precisions_on_one_rank_and_on_all():
    kernels, *steps = gpu_all.commands(4)
    assert kernels[1] == str(gpu_all.GPU) and gpu_all.GPU.exists()
    assert ["--precision fp32" in " ".join(x) for x in steps] == [True, False]
    assert all("--device cuda" in " ".join(x) and "--ranks 1,4" in " ".join(x) for x in steps)


def test_bf16_steps_run_on_a_cpu_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, command = gpu_all.commands(1, device="cpu", size="tiny")
    words = [*command, "--cases", "mlm", "--steps", "1"]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    report = json.loads(Path("bench_gpu_step_bf16.json").read_text())
    (entry,) = report["cases"]
    assert entry["case"]["precision"] == "bf16"
    losses = [row["loss"] for row in entry["contenders"].values()]
    assert len(losses) == 2 and losses == [pytest.approx(4.6, abs=0.3)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_step_on_a_gpu_that_is_not_there_is_refused(capsys):
    assert main(["bench", "step", "--device", "cuda", "--ranks", "1"]) == 2
    assert "torch finds 0" in capsys.readouterr().err
