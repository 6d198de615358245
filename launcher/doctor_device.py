"""What ``haloformer doctor`` finds out about GPUs, their driver and the compiler of Triton."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

_ASK_S = 30.0
# NCCL's ranks meet in shared memory; 64 MiB, which docker gives, ends in "unhandled system error".
_SHARED_MIB = 512
# The oldest Linux driver that runs programs built for a CUDA (CUDA Toolkit release notes, table of
# minor version compatibility).
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: fine, or not with a remedy.

    Attributes:
        subject: What was looked at.
        found: What is there.
        remedy: What puts it right, None if nothing must be.
    """

    subject: str
    found: str
    remedy: str | None = None


def device_findings(shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """GPUs if there are any and torch can use them, else the CPU; no GPU is nothing wrong.

    Args:
        shared: The filesystem of shared memory.
    """
    cores = len(os.sched_getaffinity(0))
    program = shutil.which("nvidia-smi")
    if program is None:
        if any(Path("/dev").glob("nvidia[0-9]*")):
            yield Finding("device", "a GPU without nvidia-smi", "install the NVIDIA driver's tools")
        else:
            yield Finding("device", f"cpu, {cores} cores")
        return
    cards, fault = _cards(program)
    if fault is not None:
        yield Finding(
            "device", f"nvidia-smi: {fault}", "install or load the NVIDIA driver: modprobe nvidia"
        )
        return
    driver = cards[0][1]
    found = f"{len(cards)} x {cards[0][0]}, driver {driver}, {cores} cores"
    yield Finding("device", found, _torch_fault(driver))
    yield from compiler_findings()
    if len(cards) > 1:
        yield shared_memory_finding(shared)


def _cards(program: str) -> tuple[list[tuple[str, str]], str | None]:
    """Name and driver of each GPU; or why nvidia-smi gives none."""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    cards = [(name.strip(), driver.strip()) for name, _, driver in rows]
    if done.returncode != 0 or not cards:
        said = " ".join((done.stdout + done.stderr).split())[:160]
        return [], said if said else f"exit code {done.returncode}"
    return cards, None


def _torch_fault(driver: str) -> str | None:
    """What keeps torch from the GPUs, with the remedy; None if it can use them."""
    try:
        version = importlib.metadata.version("torch")
        import torch
    except ImportError as error:  # PackageNotFoundError is one
        return f"torch cannot be imported ({error}); install it again: pip install haloformer"
    if torch.version.cuda is None:
        release = Version(version).public
        return (
            f"torch {version} is built for CPUs only, runs would not use the GPU; install the CUDA "
            f"build: pip install --force-reinstall torch=={release} --index-url https://pypi.org/simple"
        )
    old = driver_fault(driver, torch.version.cuda)
    if old is not None:
        return old
    if not torch.cuda.is_available():
        return (
            f"torch {version} finds no GPU; see why: python -c 'import torch; torch.cuda.init()', "
            "and whether CUDA_VISIBLE_DEVICES hides them"
        )
    return None


def driver_fault(driver: str, cuda: str) -> str | None:
    """Why a driver cannot run a torch that was built for a CUDA, with the remedy; else None.

    Args:
        driver: Such as "470.82.01".
        cuda: Such as "12.8".
    """
    oldest = _OLDEST_DRIVER.get(Version(cuda).major)
    if oldest is None or Version(driver) >= Version(oldest):
        return None
    return (
        f"driver {driver} is too old for CUDA {cuda}, which torch was built for; install driver "
        f"{oldest} or newer, or a torch for an older CUDA from https://download.pytorch.org/whl"
    )


def compiler_findings() -> Iterator[Finding]:
    """Triton compiles a launcher for each kernel on first use: with a C compiler and Python.h."""
    named = os.environ.get("CC")
    found = [shutil.which(name) for name in ([named] if named else ["clang", "gcc"])]
    there = next((path for path in found if path is not None), None)
    if there is None:
        missing = "neither clang nor gcc" if named is None else f"CC={named} is no program"
        yield Finding("compiler", missing, "Triton needs one on a GPU: apt-get install gcc")
        return
    header = Path(sysconfig.get_path("include")) / "Python.h"
    version = sysconfig.get_python_version()
    remedy = None if header.is_file() else f"apt-get install python{version}-dev"
    yield Finding("compiler", there if remedy is None else f"{header} is missing", remedy)


def shared_memory_finding(folder: Path) -> Finding:
    """Whether ranks on several GPUs have room to meet.

    Args:
        folder: Where shared memory is mounted.
    """
    free = shutil.disk_usage(folder).free / 2**20
    remedy = None
    if free < _SHARED_MIB:
        remedy = (
            f"below {_SHARED_MIB} MiB NCCL fails: docker run --shm-size=8g, or "
            f"mount -o remount,size=8g {folder}"
        )
    return Finding("shared memory", f"{free:.0f} MiB free in {folder}", remedy)
