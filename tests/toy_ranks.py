"""Ranks that do as they are told, and train nothing: real processes that start in no time.

``ToyCluster`` starts them where a cluster would start the worker. What each rank does in each
attempt is a word:

    finish    come to the end well          die      be killed
    obey      go on until asked to stop     crash    raise
    leave     end as stopped, unasked       refuse   find the input wrong
    hang      beat and do nothing             late     end before the first beat
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from haloformer.launcher.cluster import Answers, Meeting
from haloformer.launcher.hosts import Host
from haloformer.launcher.pulse import Pulse
from haloformer.launcher.run_dir import RunDir

CODES = {"crash": 1, "refuse": 2}


class ToyCluster:
    """Hosts of one slot each.

    Args:
        names: Of the hosts.
        script: Per attempt, the words of the ranks.
        lost: Per attempt, hosts that do not answer after it.
    """

    def __init__(
        self,
        names: Sequence[str],
        script: Sequence[Sequence[str]],
        lost: Sequence[set[str]] = (),
    ) -> None:
        self._hosts = tuple(Host(name, 1) for name in names)
        self._script, self._lost = list(script), list(lost)
        self.started: list[list[str]] = []

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self._hosts

    def check(self, used: Sequence[Host]) -> None:
        pass

    def answering(self) -> Answers:
        lost = self._gone()
        there = tuple(host for host in self._hosts if host.name not in lost)
        return Answers(there, dict.fromkeys(sorted(lost), "does not answer"))

    def meeting(self, used: Sequence[Host]) -> Meeting:
        return Meeting("127.0.0.1", 1)

    def start(
        self, run_dir: RunDir, attempt: str, used: Sequence[Host], meeting: Meeting
    ) -> subprocess.Popen[bytes]:
        words = self._script[len(self.started)]
        assert len(words) == len(used)
        self.started.append([host.name for host in used])
        return subprocess.Popen(
            [sys.executable, __file__, str(run_dir.path), attempt, json.dumps(words)],
            start_new_session=True,
        )

    def ask_stop(self, run_dir: RunDir, runner: subprocess.Popen[bytes]) -> None:
        pass

    def look(
        self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]
    ) -> dict[str, set[int] | None]:
        alive = {rank for rank, pid in run_dir.rank_pids().items() if _runs(pid)}
        return {host: set(numbers) & alive for host, numbers in ranks.items()}

    def end(self, run_dir: RunDir, ranks: Mapping[str, Sequence[int]]) -> None:
        for pid in run_dir.rank_pids().values():
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)

    def _gone(self) -> set[str]:
        after = len(self.started) - 1
        return self._lost[after] if 0 <= after < len(self._lost) else set()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def _run_ranks(run_dir: str, attempt: str, words: list[str]) -> int:
    """The runner: ends when all ranks have, with the code of one that failed."""
    command = [sys.executable, __file__, run_dir, attempt]
    ranks = [subprocess.Popen([*command, word, str(rank)]) for rank, word in enumerate(words)]
    return max(abs(rank.wait()) for rank in ranks)


def _be_a_rank(run_dir: RunDir, attempt: str, word: str, rank: int) -> int:
    if word == "late":
        return 1
    asked = threading.Event()
    pulse = Pulse(run_dir, rank, attempt, asked.set)
    pulse.start()
    pulse.at_step(1)
    # All at once, as a collective would have it: what is reported must not be who started first.
    while len(run_dir.read_beats(attempt)) < run_dir.read_plan().world_size:
        time.sleep(0.01)  # a poll interval; nothing depends on its length
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        threading.Event().wait()
    if word == "obey":
        asked.wait()
    if word in ("finish", "obey", "leave") and rank == 0:
        run_dir.write_state("finished" if word == "finish" else "stopped", 10)
    code = CODES.get(word, 0)
    pulse.end(code)
    return code


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.exit(_run_ranks(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
    sys.exit(_be_a_rank(RunDir(Path(sys.argv[1])), sys.argv[2], sys.argv[3], int(sys.argv[4])))
