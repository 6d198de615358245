"""Several hosts on one machine: network namespaces on a bridge, an sshd in each.

    this machine 10.77.x.1 --- bridge --- 10.77.x.11 alpha     each with its own sshd, ports and
                                     \\--- 10.77.x.12 beta      loopback; files and pids are shared

    with hosts(["alpha", "beta"], folder) as network:
        network.environment       # for a command that is to find them by ssh and pdsh
        network.cut("beta")       # the cable is out; nothing is said to anyone

Needs root, and Debian's packages iproute2, openssh-server and pdsh.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
_UP_S = 20.0


def why_not() -> str | None:
    """What is missing for such hosts, None if nothing is."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"needs {', '.join(missing)}: make setup-root"
    probe = f"hfp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return None


@dataclass(frozen=True)
class Network:
    """Hosts that are up.

    Attributes:
        addresses: Of each host, by name.
        ssh_config: By which ssh knows the names.
        links: Of each host, this machine's end of its cable.
    """

    addresses: dict[str, str]
    ssh_config: Path
    links: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a command that launches ranks on the hosts."""
        return {
            "PDSH_SSH_ARGS_APPEND": f"-F {self.ssh_config}",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def cut(self, name: str) -> None:
        """Pull the cable of a host: what it sends and is sent is lost without a word."""
        _run("ip", "link", "set", self.links[name], "down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        _run("ip", "link", "set", self.links[name], "up")

    def write_hostfile(self, path: Path, slots: int = 1) -> Path:
        """All hosts, in DeepSpeed's format."""
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.addresses))
        return path


@contextlib.contextmanager
def hosts(names: Sequence[str], folder: Path, second: bool = False) -> Iterator[Network]:
    """Bring hosts up, and take them down whatever happens, with all that runs on them.

    Args:
        names: Of the hosts.
        folder: For keys, logs and process ids.
        second: Beside another network of this process.
    """
    number = f"{os.getpid()}{'s' if second else ''}"
    subnet = f"10.{78 if second else 77}.{os.getpid() % 250}"
    bridge = f"hfb{number}"
    spaces = {name: f"hf{number}x{i}" for i, name in enumerate(names)}
    links = {name: f"hv{number}x{i}" for i, name in enumerate(names)}
    addresses = {name: f"{subnet}.{11 + i}" for i, name in enumerate(names)}
    for key in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    config = _write_ssh_config(folder, addresses)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd drops its privileges there
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{subnet}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for name in names:
            _plug_in(spaces[name], links[name], bridge, addresses[name])
            _start_sshd(spaces[name], addresses[name], folder, name)
        for name in names:
            _wait_for_ssh(config, name, folder)
        yield Network(addresses, config, links)
    finally:
        for name in names:
            _end_all(folder / f"{name}.pid", spaces[name])
            _try("ip", "netns", "del", spaces[name])
            _try("ip", "link", "del", links[name])
        _try("ip", "link", "del", bridge)


def _write_ssh_config(folder: Path, addresses: dict[str, str]) -> Path:
    path = folder / "ssh_config"
    named = "".join(f"Host {name}\n  HostName {ip}\n" for name, ip in addresses.items())
    path.write_text(
        f"{named}Host *\n  IdentityFile {folder / 'user_key'}\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    return path


def _plug_in(space: str, link: str, bridge: str, address: str) -> None:
    _run("ip", "netns", "add", space)
    _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
    _run("ip", "link", "set", link, "master", bridge)
    _run("ip", "link", "set", link, "up")
    inside = ("ip", "netns", "exec", space, "ip")
    _run(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
    _run(*inside, "link", "set", "eth0", "up")
    _run(*inside, "link", "set", "lo", "up")


def _start_sshd(space: str, address: str, folder: Path, name: str) -> None:
    options = {
        "ListenAddress": address,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "user_key.pub",
        "PidFile": folder / f"{name}.pid",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "UsePAM": "no",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    log = str(folder / f"{name}.log")
    sshd = _find("sshd")
    assert sshd is not None
    _run("ip", "netns", "exec", space, sshd, "-f", "/dev/null", "-E", log, *words)


def _wait_for_ssh(config: Path, name: str, folder: Path) -> None:
    deadline = time.monotonic() + _UP_S
    options = ("-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
    while True:
        done = subprocess.run(
            ["ssh", *options, name, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            log = (folder / f"{name}.log").read_text()
            raise AssertionError(f"no ssh to {name}: {done.stderr}\n{log}")
        time.sleep(0.1)  # a poll interval; nothing depends on its length


def _end_all(pid_file: Path, space: str) -> None:
    """End the sshd of a host and whatever it started, by process id."""
    pids = [int(pid_file.read_text())] if pid_file.exists() else []
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    for pid in [*pids, *map(int, listed.stdout.split())]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _find(program: str) -> str | None:
    # sbin is not on every PATH.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _run(*words: str) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _try(*words: str) -> None:
    subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True)
