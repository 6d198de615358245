"""The hosts of a run: DeepSpeed's hostfile, and which ranks go where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Names go to ssh and pdsh: nothing that either could take for an option or a pattern.
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.@-]*$")
_LINE = re.compile(r"^(\S+)\s+slots=(\d+)$")


class HostsError(ValueError):
    """The hosts cannot be used."""


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks that it runs, or could run."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Hosts of a file in DeepSpeed's format: ``name slots=N`` per line, ``#`` begins a comment.

    Raises:
        HostsError: Naming every line at fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise HostsError(f"--hostfile {path}: {reason}; give a file of 'name slots=N'") from error
    hosts: dict[str, Host] = {}
    faults = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None:
            faults.append(f"line {number}: {text!r} is not of the form 'name slots=N'")
        elif not _NAME.match(match[1]):
            faults.append(
                f"line {number}: {match[1]!r} is no host name; write letters, digits and . _ - @"
            )
        elif int(match[2]) < 1:
            faults.append(f"line {number}: {match[1]} has slots=0; give 1 or more, or remove it")
        elif match[1] in hosts:
            faults.append(f"line {number}: {match[1]} is there twice; remove one line")
        else:
            hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts and not faults:
        faults.append("no host in it; write one 'name slots=N' per line")
    if faults:
        raise HostsError(f"--hostfile {path}: {'; '.join(faults)}")
    return tuple(hosts.values())


def num_slots(hosts: Sequence[Host]) -> int:
    """Ranks that the hosts can run."""
    return sum(host.slots for host in hosts)


def fill(hosts: Sequence[Host], num_ranks: int) -> tuple[Host, ...]:
    """The hosts that ``num_ranks`` ranks need, filled in order, each with the ranks it gets.

    Raises:
        HostsError: If there are not so many slots.
    """
    left, used = num_ranks, []
    for host in hosts:
        taken = min(left, host.slots)
        if taken > 0:
            used.append(Host(host.name, taken))
        left -= taken
    if left > 0:
        raise HostsError(
            f"--ranks {num_ranks} is more than the {num_slots(hosts)} slots of the hosts; "
            f"use --ranks {num_slots(hosts)} or add hosts"
        )
    return tuple(used)


def ranks_of(used: Sequence[Host]) -> dict[str, list[int]]:
    """Host -> its ranks.

    Ranks go host by host, as DeepSpeed's launcher numbers them: "a slots=2", "b slots=1" give
    ``{"a": [0, 1], "b": [2]}``.
    """
    ranks, first = {}, 0
    for host in used:
        ranks[host.name] = list(range(first, first + host.slots))
        first += host.slots
    return ranks
