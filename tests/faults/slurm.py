"""A real SLURM of one node on this machine: munged, slurmctld and slurmd, all in one folder.

Needs root, and Debian's package slurm-wlm.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from haloformer.launcher.launch import choose_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
_UP_S = 30.0

_CONF = """
ClusterName=haloformer
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What is missing for a SLURM, None if nothing is."""
    if os.geteuid() != 0:
        return "needs root, to run slurmd"
    missing = [program for program in PROGRAMS if _find(program) is None]
    return f"needs {', '.join(missing)}: make setup-root" if missing else None


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Bring it up, and take it down whatever happens; variables for its commands."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    ports = {"ctld_port": choose_port(None), "d_port": choose_port(None)}
    conf.write_text(_CONF.format(host=socket.gethostname(), folder=folder, **ports))
    variables = {"SLURM_CONF": str(conf)}
    try:
        _start(
            [
                *("munged", "--force", "--num-threads=2", f"--key-file={key}"),
                *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"),
                *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
            ],
            variables,
        )
        _start(["slurmctld", "-f", str(conf)], variables)
        _start(["slurmd", "-f", str(conf)], variables)
        _wait_until_idle(variables, folder)
        yield variables
    finally:
        for name in ("slurmctld", "slurmd", "munged"):  # no controller, no new job
            _end(folder / f"{name}.pid")


def _start(words: list[str], variables: dict[str, str]) -> None:
    program = _find(words[0])
    assert program is not None
    done = subprocess.run(
        [program, *words[1:]],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _wait_until_idle(variables: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + _UP_S
    while True:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        if done.stdout.strip() == "idle":
            return
        if time.monotonic() > deadline:
            logs = [(folder / f"{name}.log").read_text() for name in ("slurmctld", "slurmd")]
            raise AssertionError(f"SLURM is {done.stdout}{done.stderr}\n" + "\n".join(logs))
        time.sleep(0.1)  # a poll interval; nothing depends on its length


def _end(pid_file: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)  # a poll interval; nothing depends on its length
        os.kill(pid, signal.SIGKILL)


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
