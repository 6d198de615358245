"""Tells ranks that died, or that wait for a host that is gone, from ranks that are slow.

    a rank's process    its host      what is seen                         verdict
    computes            answers       beats, and after a while a step      none: slow is fine
    ended with a code   answers       the code in its last beat            that rank failed
    killed              answers       no beat; asked, no such process      that rank died
    whatever            cut off       no step; asked 3 times, no answer    that host is lost

Hosts are asked only while nothing moves, so a run that trains costs no connection; and less and
less often while all of them answer, for a slow step may be an upload of an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from haloformer.launcher.run_dir import Beat, RunDir

SILENT_S = 5.0  # a rank beats every second
STALL_S = 6.0
ASK_EVERY_S = 2.0
ASK_AT_LEAST_EVERY_S = 30.0
STRIKES = 3
# After the first failure the others have this long to say what they saw of it.
GRACE_S = 3.0


@dataclass(frozen=True)
class Fault:
    """Why an attempt cannot go on.

    Attributes:
        text: What died.
        lost: Hosts that do not answer.
        code: 2 when the ranks refuse what the user gave, such as damaged data; else 1.
    """

    text: str
    lost: tuple[str, ...] = ()
    code: int = 1


@dataclass
class Watch:
    """Watches one attempt.

    Args:
        run_dir: Where the ranks beat.
        attempt: Which start of the ranks.
        ranks: Host -> ranks.
        look: Asks every host which of its ranks are alive; None where none answers.
    """

    run_dir: RunDir
    attempt: str
    ranks: Mapping[str, Sequence[int]]
    look: Callable[[], dict[str, set[int] | None]]
    _counts: dict[int, tuple[int, float]] = field(default_factory=dict)
    _step: int = -1
    _moved: float | None = None
    _asked: float = float("-inf")
    _pause: float = ASK_EVERY_S
    _failed: tuple[float, Fault] | None = None
    _strikes: dict[str, int] = field(default_factory=dict)
    _missing: set[int] = field(default_factory=set)

    def check(self, now: float) -> Fault | None:
        """Look at the beats, and ask the hosts when nothing moves.

        Args:
            now: Seconds of a clock that never goes back.

        Returns:
            What to end the attempt for, None while all is well.
        """
        beats = self.run_dir.read_beats(self.attempt)
        if self._failed is None and any(beat.code for beat in beats.values()):
            alive = self.look()
            # Read after the question, as in _ask: the others end while it is on its way.
            self._failed = (now, self._failure(self.run_dir.read_beats(self.attempt), alive))
        if self._failed is not None:
            since, fault = self._failed
            return fault if now - since >= GRACE_S else None
        if not self._suspicious(beats, now) or now - self._asked < self._pause:
            return None
        self._asked = now
        return self._ask(now)

    def conclude(self) -> Fault:
        """What an attempt failed of, when its runner has ended with a code other than 0."""
        if self._failed is not None:
            return self._failed[1]
        beats = self.run_dir.read_beats(self.attempt)
        return self._failure(beats, {host: set() for host in self.ranks})

    def _suspicious(self, beats: Mapping[int, Beat], now: float) -> bool:
        """No beat of some rank, or no step of any, for a while."""
        if self._moved is None:
            self._moved = now
        silent = False
        for rank, beat in beats.items():
            count, since = self._counts.get(rank, (-1, now))
            if beat.count != count:
                self._counts[rank] = (beat.count, now)
            elif beat.code is None and now - since >= SILENT_S:
                silent = True
        step = max((beat.step for beat in beats.values()), default=-1)
        if step != self._step:
            self._step, self._moved, self._pause = step, now, ASK_EVERY_S
            self._strikes.clear()
        return silent or now - self._moved >= STALL_S

    def _ask(self, now: float) -> Fault | None:
        alive = self.look()
        for host, answer in alive.items():
            self._strikes[host] = 0 if answer is not None else self._strikes.get(host, 0) + 1
        calm = all(strikes == 0 for strikes in self._strikes.values())
        self._pause = min(2 * self._pause, ASK_AT_LEAST_EVERY_S) if calm else ASK_EVERY_S
        lost = tuple(host for host, strikes in self._strikes.items() if strikes >= STRIKES)
        if lost:
            return Fault(f"{' and '.join(lost)} did not answer {STRIKES} times in a row", lost)
        # Read after the question: a rank that has ended meanwhile has said so before it did.
        gone = self._gone(self.run_dir.read_beats(self.attempt), alive)
        again, self._missing = gone & self._missing, gone
        if gone:
            self._pause = ASK_EVERY_S
        return Fault(self._name(min(again)) + " died") if again else None

    def _gone(self, beats: Mapping[int, Beat], alive: Mapping[str, set[int] | None]) -> set[int]:
        """Ranks that beat once, never said that they ended, and are not there."""
        gone = set()
        for host, answer in alive.items():
            if answer is not None:
                mine = [rank for rank in self.ranks[host] if rank in beats]
                gone |= {rank for rank in mine if beats[rank].code is None} - answer
        return gone

    def _failure(self, beats: Mapping[int, Beat], alive: Mapping[str, set[int] | None]) -> Fault:
        # A rank that was killed takes the others down, with whatever error they meet first.
        gone = self._gone(beats, alive)
        if gone:
            return Fault(self._name(min(gone)) + " was killed")
        codes = {rank: beat.code for rank, beat in sorted(beats.items()) if beat.code}
        if not codes:
            return Fault("the ranks did not start")
        refused = [rank for rank, code in codes.items() if code == 2]
        rank = refused[0] if refused else min(codes)
        text = f"{self._name(rank)} failed with exit code {codes[rank]}"
        return Fault(text, code=2 if refused else 1)

    def _name(self, rank: int) -> str:
        host = next(host for host, ranks in self.ranks.items() if rank in ranks)
        return f"rank {rank}" if len(self.ranks) == 1 else f"rank {rank} on {host}"
