"""Ranks inside a SLURM allocation: srun starts them and reaches the hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from haloformer.launcher.cluster import Meeting
from haloformer.launcher.environment import rank_environment
from haloformer.launcher.hosts import Host, HostsError
from haloformer.launcher.launch import SLURM_TASK_MODULE, worker_command
from haloformer.launcher.run_dir import RunDir
from haloformer.launcher.ssh_cluster import RemoteCluster

_TASKS = re.compile(r"^(\d+)(?:\(x(\d+)\))?$")


class Srun:
    """A command on a host of the allocation, beside the ranks that run there."""

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        """See ``remote.Shell``."""
        place = ["--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--input=none"]
        return ["srun", *place, *words]


class SlurmCluster(RemoteCluster):
    """Hosts of an allocation."""

    def __init__(
        self, hosts: Sequence[Host], folder: Path, port: int | None, address: str | None
    ) -> None:
        super().__init__(hosts, folder, port, address, Srun())

    def check_tools(self) -> None:
        """See that srun is here.

        Raises:
            HostsError: If it is not.
        """
        if shutil.which("srun") is None:
            raise HostsError("--launcher slurm needs srun; run it inside a SLURM allocation")

    def check(self, used: Sequence[Host]) -> None:
        """See that hosts can take part, each with as many ranks as the others."""
        _ranks_per_host(used)
        super().check(used)

    def start(
        self, run_dir: RunDir, attempt: str, used: Sequence[Host], meeting: Meeting
    ) -> subprocess.Popen[bytes]:
        """One step of the job; DeepSpeed's own SLURM runner cannot start a module."""
        command = [
            *("srun", "--overlap", "--kill-on-bad-exit=1", "--input=none"),
            f"--nodes={len(used)}",
            f"--ntasks={sum(host.slots for host in used)}",
            f"--ntasks-per-node={_ranks_per_host(used)}",
            f"--nodelist={','.join(host.name for host in used)}",
            *("--distribution=block", "--export=ALL"),
            *(sys.executable, "-u", "-m", SLURM_TASK_MODULE),
            *worker_command(run_dir, attempt)[1:],
        ]
        environment = {
            **rank_environment(1, os.environ),
            **self.variables(used, os.environ),
            "MASTER_ADDR": meeting.address,
            "MASTER_PORT": str(meeting.port),
        }
        return subprocess.Popen(command, env=environment, start_new_session=True)


def _ranks_per_host(used: Sequence[Host]) -> int:
    counts = {host.slots for host in used}
    if len(counts) > 1:
        raise HostsError(
            f"--launcher slurm runs as many ranks on every host, not {sorted(counts)}; "
            "give --ranks a multiple of the hosts"
        )
    return counts.pop()


def allocation(environment: Mapping[str, str]) -> tuple[Host, ...]:
    """Hosts and tasks of the job that this process belongs to.

    Args:
        environment: With what SLURM sets in a job.

    Raises:
        HostsError: Outside a job.
    """
    names = environment.get("SLURM_JOB_NODELIST")
    if names is None:
        raise HostsError(
            "--launcher slurm works inside an allocation; submit configs/slurm/haloformer.sbatch, "
            "or call it from salloc"
        )
    done = subprocess.run(
        ["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise HostsError(f"scontrol cannot read SLURM_JOB_NODELIST {names}: {done.stderr.strip()}")
    hosts = done.stdout.split()
    tasks = tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", "1"))
    if len(tasks) != len(hosts):
        raise HostsError(
            f"SLURM_TASKS_PER_NODE {environment.get('SLURM_TASKS_PER_NODE')} does not fit the "
            f"{len(hosts)} hosts of {names}; submit with --ntasks-per-node"
        )
    return tuple(Host(name, count) for name, count in zip(hosts, tasks, strict=True))


def tasks_per_node(text: str) -> list[int]:
    """SLURM_TASKS_PER_NODE spelled out: "4(x2),3" is 4, 4, 3.

    Raises:
        HostsError: If it is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _TASKS.match(part)
        if match is None:
            raise HostsError(f"SLURM_TASKS_PER_NODE {text!r} is not of the form '4(x2),3'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
