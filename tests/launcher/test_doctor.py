"""`haloformer doctor` says what is wrong and what to do; the machines here are really broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from full_disk import mounted
from haloformer.launcher.cli import main
from haloformer.launcher.doctor_device import (
    compiler_findings,
    driver_fault,
    shared_memory_finding,
)

LIMIT_S = 120.0


def doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["doctor", *options])
    return code, capsys.readouterr().out


def program(folder: Path, name: str, script: str) -> None:
    """A program on a PATH of its own."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with no server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_a_machine_that_can_train_is_well_and_looking_leaves_nothing(capsys, here):
    code, output = doctor(capsys)
    assert code == 0
    for subject in ("python", "torch", "device", "memory", "disk", "home", "loopback", "tracking"):
        assert f"ok    {subject}" in output
    assert output.endswith("all well\n")
    assert list(here.iterdir()) == []


def test_without_a_gpu_no_compiler_ssh_or_pdsh_is_missed(capsys, here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    code, output = doctor(capsys)
    assert code == 0, output


def test_a_hostfile_without_ssh_and_pdsh_is_told_what_to_install(capsys, here, monkeypatch):
    (here / "hosts").write_text("one slots=1\ntwo slots=1\n")
    monkeypatch.setenv("PATH", str(here))
    code, output = doctor(capsys, "--hostfile", "hosts")
    assert code == 2
    assert "needs ssh and pdsh; apt-get install openssh-client pdsh here" in output


def test_a_tracking_server_that_is_not_there_is_named_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    code, output = doctor(capsys)
    assert code == 2
    assert "FAIL  tracking" in output
    assert "unset tracking.uri" in output


def test_folders_that_cannot_be_written_are_named(capsys, monkeypatch):
    monkeypatch.chdir("/proc")
    monkeypatch.setenv("HOME", "/proc/nobody")
    code, output = doctor(capsys)
    assert code == 2
    assert "FAIL  disk             /proc cannot be written" in output
    assert "go to a folder of yours" in output
    assert "FAIL  home             /proc/nobody cannot be written" in output
    assert "export HOME=FOLDER" in output


def test_a_gpu_beside_a_torch_for_cpus_is_told_which_torch_to_install(capsys, here, monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    program(here, "nvidia-smi", "echo 'NVIDIA A100-SXM4-80GB, 580.95.05'")
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    code, output = doctor(capsys)
    assert code == 2
    assert "FAIL  device           1 x NVIDIA A100-SXM4-80GB, driver 580.95.05" in output
    assert "pip install --force-reinstall torch==" in output


def test_a_driver_that_is_not_loaded_is_quoted(capsys, here, monkeypatch):
    program(here, "nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver.'; exit 9")
    monkeypatch.setenv("PATH", str(here))
    code, output = doctor(capsys)
    assert code == 2
    assert "nvidia-smi: NVIDIA-SMI has failed: no driver." in output
    assert "modprobe nvidia" in output


@pytest.mark.parametrize(
    ("driver", "cuda", "oldest"),
    [
        ("470.82.01", "12.8", "525.60.13"),
        ("570.86.10", "13.0", "580.65.06"),
        ("580.65.06", "13.0", None),
        ("570.86.10", "12.4", None),
        ("999.1", "14.0", None),  # a CUDA from after this was written: torch itself will tell
    ],
)
def test_a_driver_older_than_the_cuda_of_torch_is_told_which_one_would_do(driver, cuda, oldest):
    fault = driver_fault(driver, cuda)
    assert (fault is None) if oldest is None else (fault is not None and oldest in fault)


def test_triton_without_a_compiler_is_told_to_install_one(here, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(here))
    (finding,) = compiler_findings()
    assert finding.remedy is not None and "apt-get install gcc" in finding.remedy
    program(here, "gcc", "exit 0")
    (finding,) = compiler_findings()
    assert finding.found == str(here / "gcc") or "python" in str(finding.remedy)
    monkeypatch.setenv("CC", "no-such-compiler")
    (finding,) = compiler_findings()
    assert "CC=no-such-compiler is no program" in finding.found and finding.remedy is not None


def in_a_broken_python(folder: Path, variables: Mapping[str, str]) -> tuple[int, str]:
    """The command line with a folder before all installed packages."""
    done = subprocess.run(
        [sys.executable, "-m", "haloformer.launcher.cli", "doctor"],
        env={**os.environ, "PYTHONPATH": str(folder), **variables},
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_libraries_that_are_broken_or_of_another_version_are_reported_not_raised(here):
    broken = here / "site"
    (broken / "mlflow").mkdir(parents=True)
    (broken / "mlflow" / "__init__.py").write_text("raise ImportError('libz.so.1 is missing')\n")
    (broken / "torch-2.4.0.dist-info").mkdir()
    (broken / "torch-2.4.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.4.0\n")
    code, output = in_a_broken_python(broken, {"TMPDIR": str(here / "gone")})
    assert code == 2 and "Traceback" not in output
    assert "FAIL  torch            2.4.0 (wanted " in output
    assert "-> pip install 'torch" in output
    assert "FAIL  tracking         MLflow cannot be imported: libz.so.1 is missing" in output
    assert output.endswith("2 to put right\n")


@pytest.mark.root
def test_a_disk_and_a_shared_memory_that_are_small_are_measured(capsys, here):
    with mounted(here / "small", "size=1m") as small:
        finding = shared_memory_finding(small)
        assert finding.found == f"1 MiB free in {small}"
        assert finding.remedy is not None and "--shm-size=8g" in finding.remedy
        code, output = in_a_broken_python(here, {"TMPDIR": str(small)})
        assert code == 2
        assert f"FAIL  disk             0.0 GiB free in {small}" in output
        assert "below 2 GiB runs fail" in output
