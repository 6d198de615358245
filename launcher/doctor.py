"""``haloformer doctor``: is this machine fit to train, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher import tracking
from haloformer.launcher.environment import accelerator
from haloformer.launcher.hosts import Host, HostsError, read_hostfile
from haloformer.launcher.known_runs import RUNS
from haloformer.launcher.on_host import HostFacts
from haloformer.launcher.ssh_cluster import SshCluster, differences

_LOW_DISK_GIB = 2.0
_CLOCK_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at: fine, or not with a remedy."""

    subject: str
    found: str
    remedy: str | None = None


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="check versions, device, disk, network and tracking server",
        description="Look at everything a run needs on this machine, and on the hosts of a "
        "hostfile; exit code 2 if something must be put right.",
        epilog="example: haloformer doctor --hostfile hosts",
    )
    parser.add_argument("--hostfile", type=Path, help="look at these hosts as well, over ssh")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0 when all is well, 2 otherwise."""
    checks = [_python, _versions, _device, _memory, _disk, _loopback, _tracking]
    if arguments.hostfile is not None:
        hosts = read_hostfile(arguments.hostfile)
        checks.append(lambda: _hosts(hosts))
    sick = 0
    for check in checks:
        for finding in check():
            mark = "ok  " if finding.remedy is None else "FAIL"
            print(f"{mark}  {finding.subject:<16} {finding.found}", flush=True)
            if finding.remedy is not None:
                sick += 1
                print(f"      -> {finding.remedy}", flush=True)
    print("all well" if sick == 0 else f"{sick} to put right")
    return 0 if sick == 0 else 2


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    wanted = sys.version_info >= (3, 11)
    yield Finding("python", version, None if wanted else "install Python 3.11 or newer")


def _versions() -> Iterator[Finding]:
    """The installed version of each library against what pyproject pinned."""
    for text in importlib.metadata.requires("haloformer") or []:
        requirement = Requirement(text)
        name, pins = requirement.name, requirement.specifier
        if name not in ("torch", "triton", "deepspeed", "megatron-core", "mlflow", "webdataset"):
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"pip install '{name}{pins}'")
            continue
        remedy = None if pins.contains(version) else f"pip install '{name}{pins}'"
        yield Finding(name, f"{version} (wanted {pins})", remedy)


def _device() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("device", f"{accelerator()}, {cores} cores")


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    yield Finding(
        "memory",
        f"{free:.1f} of {memory.total / 2**30:.1f} GiB free",
        None if free > 1.0 else "end other programs: a rank alone needs about 1 GiB to start",
    )


def _disk() -> Iterator[Finding]:
    for folder in (Path.cwd(), Path(os.environ.get("TMPDIR", "/tmp"))):
        free = shutil.disk_usage(folder).free / 2**30
        low = free < _LOW_DISK_GIB
        remedy = f"free some space: below {_LOW_DISK_GIB:.0f} GiB runs fail" if low else None
        yield Finding("disk", f"{free:.1f} GiB free in {folder}", remedy)


def _loopback() -> Iterator[Finding]:
    """Ranks of one machine meet on the loopback interface."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        yield Finding("loopback", str(error), "bring the interface up: ip link set lo up")
        return
    yield Finding("loopback", "ranks can meet on 127.0.0.1")


def _tracking() -> Iterator[Finding]:
    uri = tracking.tracking_uri(TrackingConfig(), os.environ.get("MLFLOW_TRACKING_URI"))
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and database.parent.is_dir() and not database.exists():
        yield Finding("tracking", f"{uri} (made at first use)")  # looking must not make it
        return
    try:
        tracking.connect(uri)
    except tracking.TrackingError as error:
        yield Finding("tracking", uri, str(error))
        return
    yield Finding("tracking", uri)


def _hosts(hosts: Sequence[Host]) -> Iterator[Finding]:
    """Every host as it sees itself, what the first one says being what all should say."""
    cluster = SshCluster(hosts, RUNS, None, None)
    try:
        cluster.check_tools()
    except HostsError as error:
        yield Finding("hosts", "not looked at", str(error))
        return
    uri = tracking.tracking_uri(TrackingConfig(), os.environ.get("MLFLOW_TRACKING_URI"))
    facts, faults = cluster.facts(hosts, uri)
    unlike = differences(hosts, facts)
    for host in hosts:
        if host.name not in facts:
            yield Finding(host.name, "", f"it {faults[host.name]}")
            continue
        mine = facts[host.name]
        remedies = [f"it {fault[host.name]}" for fault in (faults, unlike) if host.name in fault]
        if mine.free_bytes is not None and mine.free_bytes < _LOW_DISK_GIB * 2**30:
            remedies.append(f"free some space there: below {_LOW_DISK_GIB:.0f} GiB runs fail")
        if abs(mine.clock) > _CLOCK_S:
            remedies.append("set its clock, or run chrony: records of two hosts cannot be compared")
        if mine.tracking_fault is not None:
            remedies.append(f"it cannot reach the tracking server: {mine.tracking_fault}")
        yield Finding(host.name, _describe(host, mine), "; ".join(remedies) or None)


def _describe(host: Host, facts: HostFacts) -> str:
    """A row of the table: the same columns for every host."""
    versions = " ".join(f"{name} {version}" for name, version in facts.versions.items())
    device = f"{facts.devices} GPUs" if facts.accelerator == "cuda" else f"{facts.cores} cores"
    free = "no disk" if facts.free_bytes is None else f"{facts.free_bytes / 2**30:.0f} GiB free"
    return (
        f"{facts.address:<15} slots={host.slots} {facts.accelerator} {device:<8} {free:<14} "
        f"clock {facts.clock:+.1f} s  {versions}"
    )
