"""Kill ranks of real training runs at random moments, and see that nothing of it shows at the end.

    python tests/faults/kill.py --kills 50 --seed 1

A small run of three phases is trained once without disturbance. Then it is trained again and
again, and each life ends with SIGKILL of a random rank at a random moment (in a step, after the
snapshot of a checkpoint, anywhere in its commit) until the kills are used up. Every run that comes
to its end must have the same losses, gradient norms, held-out losses and final weights and moments
as the undisturbed one, bit for bit; MLflow must know each loss once, and once in the run of its
phase.

The seed repeats the ranks, steps, phases and delays; where in a step a delay ends is the clock's.
"""

import argparse
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from haloformer.launcher import checkpoint, rank_main
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of all tests

from dying import PHASES, DyingCommitter, die, die_later
from launcher_runs import write_project
from lives import Runner
from servers import TrackingServer

RANKS = 2
STAGES = (
    {"steps": 6, "seq_len": 64, "attention_window": 8, "global_batch": 8},
    {"steps": 8, "micro_batch": 2, "warmup_steps": 2},
    {"steps": 10, "learning_rate": 0.002},
)
# 6, 14 and 24: at a checkpoint, between two, at the last.
ENDS = tuple(itertools.accumulate(stage["steps"] for stage in STAGES))
STEPS = ENDS[-1]
EVERY = 3  # steps between two checkpoints
LONGEST_DELAY_S = 0.3  # some steps of this model
PLACES = ("step", "step", "snapshot", "in_upload", *PHASES)


@dataclass(frozen=True)
class Doom:
    """Where a life ends: at ``place``, of the step or of the first checkpoint from there on."""

    rank: int
    place: str
    step: int
    delay: float

    @staticmethod
    def draw(chance: random.Random, start: int) -> "Doom":
        """A doom not far after step ``start``."""
        place = chance.choice(PLACES)
        rank = PHASES.get(place)
        return Doom(
            rank=chance.randrange(RANKS) if rank is None else rank,
            place=place,
            step=start + chance.randrange(2 * EVERY),
            delay=chance.random() * LONGEST_DELAY_S,
        )

    def arm(self, rank: int) -> None:
        """In the doomed rank: put a trap where the doom says."""
        if rank != self.rank:
            return
        if self.place == "step":
            self._arm_steps()
        elif self.place == "snapshot":
            self._arm_snapshots()
        else:
            self._arm_commits()

    def _arm_steps(self) -> None:
        doom, train_step = self, Trainer._train_step

        def step_with_a_bomb(trainer: Trainer, step: int) -> bool:
            if step == doom.step:
                die_later(doom.delay)
            return train_step(trainer, step)

        Trainer._train_step = step_with_a_bomb

    def _arm_snapshots(self) -> None:
        doom, save = self, CheckpointStore.save

        def save_but_die(store, engine, step, state):
            if step >= doom.step:
                checkpoint.take_snapshot(engine, store._topology)
                die()
            save(store, engine, step, state)

        CheckpointStore.save = save_but_die

    def _arm_commits(self) -> None:
        doom = self

        class DyingStore(CheckpointStore):
            def _make_committer(self):
                committer = DyingCommitter(
                    self.catalog, self._config, self._staging, self._topology
                )
                committer.phase, committer.step = doom.place, doom.step
                committer.delay = doom.delay * 0.1  # files of this model are soon sent
                return committer

        rank_main.CheckpointStore = DyingStore


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, required=True, help="how many ranks are killed")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument(
        "--server",
        action="store_true",
        help="keep checkpoints behind a real MLflow server (default: in a folder of this machine)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = None
        if arguments.server:
            server = TrackingServer(Path(folder))
            server.start()
            stack.callback(server.stop)
        chance = random.Random(arguments.seed)
        try:
            kill(Path(folder), arguments.kills, chance, server and server.url)
        except AssertionError:
            log = Path(folder, "ranks.log")
            print(log.read_text()[-4000:] if log.exists() else "", file=sys.stderr)
            raise
    return 0


def kill(folder: Path, num_kills: int, chance: random.Random, server: str | None) -> None:
    """Train, and train again under fire until ``num_kills`` ranks have died."""
    write_project(folder)
    truth = new_run(folder, "truth", server)
    assert truth.live(RANKS), "nobody was to be killed"
    records, files, told = truth.records(), truth.files(), truth.told()
    assert len(records) > STEPS and files and len(told) == STEPS
    phases = truth.told_of_phases()
    assert phases == [
        (str(sum(step > end for end in ENDS)), "FINISHED", step, loss) for step, loss in told
    ]
    print(f"undisturbed: {STEPS} steps in 3 phases, a checkpoint every {EVERY}", flush=True)
    died: Counter[str] = Counter()
    number = 0
    while died.total() < num_kills:
        number += 1
        run, started = new_run(folder, f"run{number}", server), time.monotonic()
        before = died.total()
        while True:
            doom = None
            if died.total() < num_kills:
                doom = Doom.draw(chance, run.committed() or 0)
            ended = run.live(RANKS, doom and doom.arm, doom.rank if doom else None)
            if ended:
                break
            died[doom.place] += 1
        assert run.records() == records, f"run {number}: the losses differ"
        assert run.files() == files, f"run {number}: the final checkpoint differs"
        assert run.told() == told, f"run {number}: MLflow heard other losses, or twice"
        assert run.told_of_phases() == phases, f"run {number}: MLflow heard else of the phases"
        assert not run.leftovers(), f"run {number}: files of {run.leftovers()} were left"
        print(
            f"run {number}: killed {died.total() - before} times, then as undisturbed, bit for "
            f"bit ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
    for place, count in sorted(died.items()):
        print(f"killed at {place}: {count}")


def new_run(folder: Path, name: str, server: str | None) -> Runner:
    run = Runner(folder, name, server)
    run.recipe |= {"phases": STAGES, "checkpoint": {"every": EVERY}, "eval": {"batches": 2}}
    return run


if __name__ == "__main__":
    sys.exit(main())
