"""What tells a rank that died, or a host that is gone, from a rank that is slow."""

from pathlib import Path

import pytest

from haloformer.launcher.run_dir import Beat, RunDir
from haloformer.launcher.watch import ASK_EVERY_S, GRACE_S, SILENT_S, STALL_S, STRIKES, Watch


class Watched:
    """Two hosts of one rank each, a clock, and what the hosts would answer."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.create()
        self.alive: dict[str, set[int] | None] = {"a": {0}, "b": {1}}
        self.asked = 0
        self.now = 0.0
        self.meanwhile = lambda: None
        self.counts = [0, 0]
        self.watch = Watch(self.run_dir, "now", {"a": [0], "b": [1]}, self._look)

    def beat(self, rank: int, step: int, code: int | None = None, attempt: str = "now") -> None:
        self.counts[rank] += 1
        self.run_dir.write_beat(rank, Beat(attempt, self.counts[rank], step, code))

    def fault_within(self, seconds: float, beating=(0, 1), step: int = 3) -> str | None:
        """Let time pass, a second at a time; what the watch says then, None if nothing."""
        for _ in range(int(seconds)):
            for rank in beating:
                self.beat(rank, step)
            fault = self.watch.check(self.now)
            if fault is not None:
                return f"{fault.text} {list(fault.lost)} {fault.code}"
            self.now += 1.0
        return None

    def _look(self) -> dict[str, set[int] | None]:
        self.asked += 1
        self.meanwhile()
        return self.alive


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_run_that_moves_costs_no_question(watched: Watched) -> None:
    for step in range(100):
        assert watched.fault_within(2, step=step) is None
    assert watched.asked == 0


def test_a_step_of_an_hour_on_hosts_that_answer_is_slow_and_nothing_else(watched: Watched) -> None:
    assert watched.fault_within(3600) is None
    assert 100 < watched.asked < 200


def test_a_host_that_does_not_answer_while_nothing_moves_is_lost(watched: Watched) -> None:
    assert watched.fault_within(3) is None
    watched.alive["b"] = None  # cut off: what it writes to the shared folder may still be seen
    limit = STALL_S + (STRIKES + 1) * ASK_EVERY_S
    assert watched.fault_within(limit) == "b did not answer 3 times in a row ['b'] 1"


def test_one_answer_clears_the_strikes(watched: Watched) -> None:
    watched.alive["b"] = None
    assert watched.fault_within(STALL_S + (STRIKES - 1) * ASK_EVERY_S) is None
    watched.alive["b"] = {1}
    assert watched.fault_within(ASK_EVERY_S) is None
    watched.alive["b"] = None
    assert watched.fault_within(STRIKES * ASK_EVERY_S) is None
    assert watched.fault_within(2 * ASK_EVERY_S) is not None


def test_a_killed_rank_is_noticed_by_its_silence_though_the_others_hang(watched: Watched) -> None:
    assert watched.fault_within(3) is None
    watched.alive["b"] = set()
    fault = watched.fault_within(SILENT_S + 3 * ASK_EVERY_S, beating=(0,))
    assert fault == "rank 1 on b died [] 1"


def test_a_failed_rank_is_reported_after_the_others_had_time_to_say_theirs(
    watched: Watched,
) -> None:
    assert watched.fault_within(2) is None
    watched.beat(1, 3, code=1)
    assert watched.fault_within(GRACE_S, beating=(0,)) is None
    assert watched.fault_within(2, beating=(0,)) == "rank 1 on b failed with exit code 1 [] 1"


def test_damaged_input_is_the_users_though_it_takes_the_others_down(watched: Watched) -> None:
    watched.beat(0, 3, code=1)
    watched.beat(1, 3, code=2)
    assert watched.fault_within(GRACE_S + 2, beating=()) == (
        "rank 1 on b failed with exit code 2 [] 2"
    )
    assert watched.watch.conclude().code == 2


def test_a_kill_is_no_ones_input_whatever_the_others_die_of(watched: Watched) -> None:
    watched.beat(0, 3)
    watched.beat(1, 3)
    watched.beat(0, 3, code=2)
    watched.alive["b"] = set()
    assert watched.fault_within(GRACE_S + 2, beating=()) == "rank 1 on b was killed [] 1"


def test_a_rank_that_ends_while_the_hosts_are_asked_was_not_killed(watched: Watched) -> None:
    watched.beat(0, 3)
    watched.beat(1, 3, code=2)

    def lose_the_peer() -> None:
        watched.beat(0, 3, code=1)
        watched.alive = {"a": set(), "b": set()}

    watched.meanwhile = lose_the_peer
    fault = watched.fault_within(GRACE_S + 2, beating=())
    assert fault == "rank 1 on b failed with exit code 2 [] 2"


def test_ranks_that_end_well_at_different_times_are_no_fault(watched: Watched) -> None:
    assert watched.fault_within(3) is None
    watched.beat(1, 3, code=0)
    watched.alive["b"] = set()
    assert watched.fault_within(100, beating=(0,)) is None


def test_beats_of_an_earlier_attempt_do_not_count(watched: Watched) -> None:
    watched.beat(1, 3, code=1, attempt="before")
    assert watched.fault_within(GRACE_S + 2, beating=(0,)) is None
    assert watched.watch.conclude().text == "rank 0 on a was killed"
