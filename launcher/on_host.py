"""What a host of a run is asked by the launching machine; started there over ssh or srun.

    python -m haloformer.launcher.on_host facts FOLDER [--port N] [--tracking URI]
    python -m haloformer.launcher.on_host ranks RUN_DIR 0,1 [--kill]

The answer is one line of JSON, the last of the output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlparse

import psutil

from haloformer.launcher.environment import accelerator
from haloformer.launcher.launch import alive_ranks, choose_port, signal_ranks
from haloformer.launcher.run_dir import RunDir

_CONNECT_S = 4.0

PACKAGES = ("torch", "deepspeed", "haloformer")


@dataclass(frozen=True)
class HostFacts:
    """A host as it sees itself.

    Attributes:
        versions: Of Python and the packages that all hosts must agree on; "missing" if not there.
        accelerator: "cuda" or "cpu".
        devices: GPUs, 0 where there is none.
        cores: Of the CPU that a process may use.
        free_bytes: On the disk of the folder, None when the folder is not there.
        seen: Names in the folder that begin with a dot.
        clock: Seconds since 1970; the launching machine makes it the lead over its own clock.
        address: By which other hosts reach it.
        port: A free one, None when the wanted one is taken.
        tracking_fault: Why the tracking server cannot be used from here, None if it can.
    """

    versions: dict[str, str]
    accelerator: str
    devices: int
    cores: int
    free_bytes: int | None
    seen: list[str]
    clock: float
    address: str
    port: int | None
    tracking_fault: str | None


def main() -> int:
    """Answer one question; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    facts = questions.add_parser("facts")
    facts.add_argument("folder", type=Path)
    facts.add_argument("--port", type=int)
    facts.add_argument("--tracking")
    ranks = questions.add_parser("ranks")
    ranks.add_argument("run_dir", type=Path)
    ranks.add_argument("ranks", type=lambda text: {int(rank) for rank in text.split(",")})
    ranks.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    if arguments.question == "facts":
        print(json.dumps(asdict(_facts(arguments.folder, arguments.port, arguments.tracking))))
        return 0
    run_dir = RunDir(arguments.run_dir)
    if arguments.kill:
        signal_ranks(run_dir, signal.SIGKILL, arguments.ranks)
    print(json.dumps(sorted(alive_ranks(run_dir, arguments.ranks))))
    return 0


def _facts(folder: Path, port: int | None, tracking: str | None) -> HostFacts:
    there = folder.is_dir()
    try:
        free_port = choose_port(port, "")
    except ValueError:
        free_port = None
    return HostFacts(
        versions={"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        accelerator=accelerator(),
        devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        cores=len(os.sched_getaffinity(0)),
        free_bytes=shutil.disk_usage(folder).free if there else None,
        seen=[path.name for path in folder.glob(".*")] if there else [],
        clock=time.time(),
        address=_address(os.environ.get("SSH_CONNECTION", "").split()),
        port=free_port,
        tracking_fault=None if tracking is None else _tracking_fault(tracking),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _tracking_fault(uri: str) -> str | None:
    """Why an address of a tracking server leads nowhere; MLflow itself takes seconds to import."""
    parsed = urlparse(uri)
    if parsed.hostname is None:
        path = parsed.path.removeprefix("/") if parsed.scheme == "sqlite" else parsed.path
        folder = Path(path).parent
        return None if folder.is_dir() else f"{folder} is not there"
    port = parsed.port
    if port is None:
        port = 443 if parsed.scheme == "https" else 80
    try:
        socket.create_connection((parsed.hostname, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"{parsed.hostname}:{port}: {error}"
    return None


def _address(connection: list[str]) -> str:
    """The address by which the launching machine reached this one; it names no loopback.

    Args:
        connection: SSH_CONNECTION: address and port of the client, then of the server.
    """
    candidates = connection[2:3]
    for addresses in psutil.net_if_addrs().values():
        candidates += [entry.address for entry in addresses if entry.family == socket.AF_INET]
    for address in candidates:
        if not address.startswith("127.") and address != "::1":
            return address
    return "127.0.0.1"


if __name__ == "__main__":
    sys.exit(main())
