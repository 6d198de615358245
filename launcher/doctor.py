"""``haloformer doctor``: is this machine fit to train, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher.doctor_device import Finding, device_findings
from haloformer.launcher.hosts import Host, HostsError, read_hostfile
from haloformer.launcher.launch import LaunchError, choose_port
from haloformer.launcher.on_host import HostFacts

# MLflow is imported where it is asked for: it may be what is broken.

_LOW_DISK_GIB = 2.0
_CLOCK_S = 5.0
_ALWAYS_SHOWN = ("torch", "triton", "deepspeed", "megatron-core", "mlflow", "webdataset")


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
    checks = [_python, _versions, device_findings, _memory, _folders, _loopback, _tracking]
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
    """The installed version of each library against what pyproject asks for."""
    try:
        wanted = importlib.metadata.requires("haloformer")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "haloformer", "imported from a folder", "install it: pip install --editable ."
        )
        return
    for requirement in map(Requirement, [] if wanted is None else wanted):
        name, pins = requirement.name, requirement.specifier
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # of an extra, or of another system
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"pip install '{name}{pins}'")
            continue
        remedy = None if pins.contains(version) else f"pip install '{name}{pins}'"
        if remedy is not None or name in _ALWAYS_SHOWN:
            yield Finding(name, f"{version} (wanted {pins})", remedy)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    yield Finding(
        "memory",
        f"{free:.1f} of {memory.total / 2**30:.1f} GiB free",
        None if free > 1.0 else "end other programs: a rank alone needs about 1 GiB to start",
    )


def _folders() -> Iterator[Finding]:
    """Runs are written here, scratch files to the temporary folder, caches to the home folder."""
    here = Path.cwd()
    yield _folder("disk", here, "runs/ and mlflow.db are made here: go to a folder of yours")
    try:
        scratch = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Finding("disk", str(error), "export TMPDIR=FOLDER, one that can be written")
    else:
        yield _folder("disk", scratch, "export TMPDIR=FOLDER, one that can be written")
    home = Path(os.path.expanduser("~"))
    yield _folder("home", home, "Triton and matplotlib keep caches there: export HOME=FOLDER")


def _folder(subject: str, folder: Path, remedy: str) -> Finding:
    """Whether a folder can be written and has room."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Finding(subject, f"{folder} cannot be written ({error.strerror})", remedy)
    low = free < _LOW_DISK_GIB
    return Finding(
        subject,
        f"{free:.1f} GiB free in {folder}",
        f"free some space: below {_LOW_DISK_GIB:.0f} GiB runs fail" if low else None,
    )


def _loopback() -> Iterator[Finding]:
    """Ranks of one machine meet on the loopback interface, at a port like this."""
    try:
        port = choose_port(None)
    except LaunchError as error:
        yield Finding("loopback", str(error), "bring the interface up: ip link set lo up")
        return
    try:
        with (
            socket.create_server(("127.0.0.1", port)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        found = f"port {port}: {error}"
        yield Finding("loopback", found, "a firewall? iptables -I INPUT -i lo -j ACCEPT")
        return
    yield Finding("loopback", f"ranks can meet on 127.0.0.1, at port {port} for one")


def _tracking() -> Iterator[Finding]:
    try:
        from haloformer.launcher import tracking
    except ImportError as error:
        again = "pip install --force-reinstall mlflow"
        yield Finding("tracking", f"MLflow cannot be imported: {error}", again)
        return
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
    from haloformer.launcher import tracking
    from haloformer.launcher.known_runs import RUNS
    from haloformer.launcher.ssh_cluster import SshCluster, differences

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
