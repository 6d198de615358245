"""Questions to many hosts at once, each with a time limit, over ssh."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

ON_HOST = "haloformer.launcher.on_host"

_CONNECT_S = 4
# Connecting, and a Python that starts from a busy network disk.
ANSWER_S = 20.0


class Shell(Protocol):
    """How a command gets to a host."""

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        """The local command that runs ``words`` on ``host``."""


class Ssh:
    """The user's own ssh, with the options that pdsh is given as well."""

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        """See ``Shell``."""
        options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
        # Never a question on the terminal, and a host that is gone is noticed soon.
        options += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}"]
        options += ["-o", f"ServerAliveInterval={_CONNECT_S}", "-o", "ServerAliveCountMax=2"]
        return ["ssh", *options, host, shlex.join(words)]


@dataclass(frozen=True)
class Answer:
    """What a host said.

    Attributes:
        value: The answer, None if there is none.
        fault: Why there is none.
        time: When it was there, in seconds since 1970 of this machine.
    """

    value: Any
    fault: str | None
    time: float


def ask(shell: Shell, questions: Mapping[str, Sequence[str]]) -> dict[str, Answer]:
    """Ask hosts, all at the same time.

    Args:
        shell: How to reach them.
        questions: Host -> arguments of ``on_host``.

    Returns:
        Host -> what it said.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(questions))) as pool:
        answers = pool.map(lambda item: _ask_one(shell, *item), questions.items())
        return dict(zip(questions, answers, strict=True))


def _ask_one(shell: Shell, host: str, question: Sequence[str]) -> Answer:
    words = [sys.executable, "-m", ON_HOST, *question]
    if "PYTHONPATH" in os.environ:
        words = ["env", f"PYTHONPATH={os.environ['PYTHONPATH']}", *words]
    try:
        done = subprocess.run(
            shell.command(host, words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            start_new_session=True,  # Ctrl-C is the launcher's to handle
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer in {ANSWER_S:.0f} s", time.time())
    now, lines = time.time(), done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = " ".join(done.stderr.split())[-300:]
        return Answer(None, said if said else f"exit code {done.returncode}", now)
    try:
        return Answer(json.loads(lines[-1]), None, now)
    except json.JSONDecodeError:
        said = f"said {lines[-1][:100]!r}, which is no JSON; silence its login files"
        return Answer(None, said, now)
