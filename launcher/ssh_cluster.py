"""Ranks on many hosts: the stock `deepspeed` runner with pdsh, and ssh to look after them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from haloformer.launcher.cluster import Answers, Meeting
from haloformer.launcher.environment import rank_environment
from haloformer.launcher.hosts import Host, HostsError
from haloformer.launcher.launch import LaunchError, worker_command
from haloformer.launcher.on_host import HostFacts
from haloformer.launcher.remote import Shell, Ssh, ask
from haloformer.launcher.run_dir import RunDir

# They say how ranks talk to each other, which is for all hosts or for none. Names that begin with
# PYTHON, MLFLOW and (with a GPU) NCCL travel without our help.
_TRAVELLING = ("GLOO_", "NCCL_", "OMP_", "TORCH_", "DS_ACCELERATOR", "TORCHINDUCTOR_", "TRITON_")

_FACTS = {field.name for field in fields(HostFacts)}


class RemoteCluster:
    """What ssh and SLURM have in common: questions to hosts that share the run folder.

    Args:
        hosts: That may take part.
        folder: Of the runs; every host must see it.
        port: On which rank 0 listens, None for a free one.
        address: Of the first host, None to find it out.
        shell: How a question gets to a host.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        folder: Path,
        port: int | None,
        address: str | None,
        shell: Shell,
    ) -> None:
        self.hosts, self._folder = tuple(hosts), folder.resolve()
        self._port, self._address, self._shell = port, address, shell
        self._known: dict[str, HostFacts] = {}

    def facts(
        self, hosts: Sequence[Host], tracking: str | None = None
    ) -> tuple[dict[str, HostFacts], dict[str, str]]:
        """What each host says of itself, and why others cannot take part.

        A host that sees another folder of this name is named, too: a file in it tells.

        Args:
            hosts: To ask.
            tracking: A tracking server that they must reach.
        """
        options = [] if self._port is None else ["--port", str(self._port)]
        options += [] if tracking is None else ["--tracking", tracking]
        with _marker(self._folder) as marker:
            questions = {host.name: ["facts", str(self._folder), *options] for host in hosts}
            answers = ask(self._shell, questions)
        facts, faults = {}, {}
        for host, answer in answers.items():
            if answer.fault is not None:
                faults[host] = f"does not answer: {answer.fault}"
                continue
            if answer.value.keys() != _FACTS:
                faults[host] = "has another haloformer; install the same on all hosts"
                continue
            mine = HostFacts(**answer.value)
            # But for the time that the answer was on its way.
            facts[host] = self._known[host] = replace(mine, clock=mine.clock - answer.time)
            if marker not in facts[host].seen:
                faults[host] = (
                    f"does not see {self._folder} as this machine does; put it on a filesystem "
                    "that all hosts share"
                )
        return facts, faults

    def check(self, used: Sequence[Host]) -> None:
        """See that hosts can take part, before anything starts.

        Raises:
            HostsError: Naming every host that cannot, and why.
        """
        self.check_tools()
        facts, faults = self.facts(used)
        faults = {**differences(used, facts), **faults}
        first = facts.get(used[0].name)
        if first is not None and first.port is None:
            taken = f"uses the port of --master-port {self._port}; give another, or none"
            faults.setdefault(used[0].name, taken)
        if faults:
            raise HostsError("; ".join(f"host {host} {fault}" for host, fault in faults.items()))

    def check_tools(self) -> None:
        """See that this machine has the programs it needs."""
        raise NotImplementedError

    def answering(self) -> Answers:
        """Hosts that answer and see the run folder."""
        _, faults = self.facts(self.hosts)
        return Answers(tuple(host for host in self.hosts if host.name not in faults), faults)

    def meeting(self, used: Sequence[Host]) -> Meeting:
        """The first host's address, as it was reached from here, and a port that is free there.

        Raises:
            LaunchError: If the port that was asked for is taken.
        """
        first = used[0].name
        port = [] if self._port is None else ["--port", str(self._port)]
        answer = ask(self._shell, {first: ["facts", str(self._folder), *port]})[first]
        if answer.fault is not None:
            raise LaunchError(f"host {first} does not answer: {answer.fault}")
        facts = HostFacts(**answer.value)
        if facts.port is None:
            raise LaunchError(
                f"--master-port {self._port} is taken on {first}; give another, or none"
            )
        # The address that was given is that of the first host of all, which may be lost by now.
        given = self._address is not None and first == self.hosts[0].name
        return Meeting(str(self._address) if given else facts.address, facts.port)

    def ask_stop(self, run_dir: RunDir, runner: subprocess.Popen[bytes]) -> None:
        """Nothing: the ranks read their orders within a second."""

    def look(
        self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]
    ) -> dict[str, set[int] | None]:
        """Ask every host."""
        answers = ask(self._shell, _questions(run_dir, ranks))
        return {
            host: None if answer.fault is not None else set(answer.value)
            for host, answer in answers.items()
        }

    def end(self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]) -> None:
        """Kill the ranks of every host that answers."""
        ask(self._shell, _questions(run_dir, ranks, "--kill"))

    def variables(self, used: Sequence[Host], inherited: Mapping[str, str]) -> dict[str, str]:
        """What the ranks of other hosts need of this environment, and what it does not say.

        Args:
            used: Hosts that have answered; they, not this machine, say what the ranks run on.
            inherited: What is set here stays as it is.
        """
        known = [self._known[host.name] for host in used]
        shares = [facts.cores // host.slots for facts, host in zip(known, used, strict=True)]
        wanted = {
            "DS_ACCELERATOR": known[0].accelerator,
            "OMP_NUM_THREADS": str(max(1, min(shares))),
            **inherited,
        }
        return {
            key: value
            for key, value in sorted(wanted.items())
            if key.startswith(_TRAVELLING) and "\n" not in value
        }


class SshCluster(RemoteCluster):
    """Hosts of a hostfile."""

    def __init__(
        self, hosts: Sequence[Host], folder: Path, port: int | None, address: str | None
    ) -> None:
        super().__init__(hosts, folder, port, address, Ssh())

    def check_tools(self) -> None:
        """See that ssh and pdsh are here.

        Raises:
            HostsError: Naming what is missing.
        """
        packages = {"ssh": "openssh-client", "pdsh": "pdsh"}
        missing = [program for program in packages if shutil.which(program) is None]
        if missing:
            install = " ".join(packages[program] for program in missing)
            raise HostsError(
                f"--hostfile needs {' and '.join(missing)}; apt-get install {install} here"
            )

    def start(
        self, run_dir: RunDir, attempt: str, used: Sequence[Host], meeting: Meeting
    ) -> subprocess.Popen[bytes]:
        """The `deepspeed` command, on exactly these hosts."""
        hostfile, variables = run_dir.path / "hostfile", run_dir.path / "deepspeed_env"
        hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in used))
        _write_variables(variables, self.variables(used, os.environ))
        command = [
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(hostfile), "--force_multi", "--no_ssh_check"),
            *("--launcher", "pdsh", "--log_level", "error", "--quiet"),
            *("--master_addr", meeting.address, "--master_port", str(meeting.port), "--module"),
            *worker_command(run_dir, attempt),
        ]
        environment = {**rank_environment(1, os.environ), "DS_ENV_FILE": str(variables)}
        # A session of its own: Ctrl-C must not reach the runner, which answers it with a broad
        # `pkill -f` on every host.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )


def differences(hosts: Sequence[Host], facts: Mapping[str, HostFacts]) -> dict[str, str]:
    """Hosts that are not like the first one, or have fewer GPUs than slots; and in what."""
    found: dict[str, str] = {}
    first = hosts[0].name
    for host in hosts:
        if host.name not in facts or first not in facts:
            continue
        mine, wanted = facts[host.name], facts[first]
        parts = [
            f"{name} {mine.versions[name]} (on {first} {version})"
            for name, version in wanted.versions.items()
            if mine.versions[name] != version
        ]
        if mine.accelerator != wanted.accelerator:
            parts.append(f"{mine.accelerator} (on {first} {wanted.accelerator})")
        if parts:
            found[host.name] = f"has {', '.join(parts)}; install the same on all hosts"
        elif mine.accelerator == "cuda" and host.slots > mine.devices:
            found[host.name] = f"has {mine.devices} GPUs for slots={host.slots}; lower slots"
    return found


def _questions(
    run_dir: RunDir, ranks: Mapping[str, Sequence[int]], *options: str
) -> dict[str, list[str]]:
    return {
        host: ["ranks", str(run_dir.path), ",".join(map(str, numbers)), *options]
        for host, numbers in ranks.items()
    }


@contextlib.contextmanager
def _marker(folder: Path) -> Iterator[str]:
    """A folder with a name that only this one has; it is no run, and not taken for one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".seen-{secrets.token_hex(8)}"
    path.mkdir()
    try:
        yield path.name
    finally:
        path.rmdir()


def _write_variables(path: Path, variables: Mapping[str, str]) -> None:
    """For DeepSpeed to export on every host.

    The user's own file of that kind, which ours takes the place of, comes first.
    """
    lines = []
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (Path.home(), Path.cwd()):
        if (folder / name).is_file():
            lines += (folder / name).read_text(encoding="utf-8").splitlines()
    lines += [f"{key}={value}" for key, value in variables.items()]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines if line.strip())
