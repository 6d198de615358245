"""Walk one run over layouts, and hold every batch and loss to those of one rank.

    python tests/faults/walk.py

4 ranks (context 2, ZeRO-3) -> 2 ranks (ZeRO-1) -> 3 ranks (context 3, ZeRO-2) -> 1 rank. Each start
stops with a checkpoint, the next goes on from it. The walk is longer than an epoch.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from haloformer.data_pipeline.index import load_index
from haloformer.launcher.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of all tests

from launcher_runs import write_project
from lives import Runner

LAYOUTS = (
    (4, {"context": 2, "zero_stage": 3}),
    (2, {"context": 1, "zero_stage": 1}),
    (3, {"context": 3, "zero_stage": 2}),
    (1, {"context": 1, "zero_stage": 1}),
)
STEPS_EACH = 16
STEPS = STEPS_EACH * len(LAYOUTS)
SEQ_LEN = 128  # on 3 ranks it is padded to 129
TOLERANCE = 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            walk(Path(folder))
        except AssertionError:
            log = Path(folder, "ranks.log")
            print(log.read_text()[-4000:] if log.exists() else "", file=sys.stderr)
            raise
    return 0


def walk(folder: Path) -> None:
    """Train on one rank, then on the layouts in turn, and compare."""
    write_project(folder)
    num_tokens = load_index(folder / "data" / "train").num_tokens
    truth, walker = new_run(folder, "truth"), new_run(folder, "walk")
    batch = truth.recipe["batch"]["global_batch"]
    assert STEPS * batch * (SEQ_LEN - 2) > num_tokens, "the walk is shorter than an epoch"
    assert truth.live(1, lambda _: watch(folder / "truth.batches", STEPS), parallel=LAYOUTS[3][1])
    for number, (num_ranks, parallel) in enumerate(LAYOUTS):
        stop = STEPS_EACH * (number + 1)
        assert walker.live(
            num_ranks, lambda _, stop=stop: watch(folder / "walk.batches", stop), parallel=parallel
        )
        assert walker.committed() == stop
        print(f"{num_ranks} ranks, {parallel}: steps {stop - STEPS_EACH} to {stop}", flush=True)
    wanted, seen = batches(folder / "truth.batches"), batches(folder / "walk.batches")
    assert len(wanted) == len(seen) == STEPS * batch
    assert seen == wanted, "other batches"
    far = 0.0
    for ours, theirs in zip(walker.records(), truth.records(), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in ("loss", "eval_loss"):
            if key in ours:
                far = max(far, abs(ours[key] / theirs[key] - 1))
    assert far <= TOLERANCE, f"losses differ by {far:.1e}"
    print(f"{STEPS} steps, {len(seen)} sequences as on one rank; losses within {far:.1e}")


def new_run(folder: Path, name: str) -> Runner:
    run = Runner(folder, name)
    run.recipe |= {"steps": STEPS, "checkpoint": {"every": 1000}, "eval": {"batches": 2}}
    run.recipe["model"] |= {"max_positions": 132}
    run.recipe["optim"] |= {"learning_rate": 3e-4}
    return run


def watch(file: Path, stop: int) -> None:
    """In a rank: note a hash of every sequence that is trained on, and stop after a step."""
    train_step = Trainer._train_step

    def watched_step(trainer, step):
        next_batch = trainer.opened.train.next_batch

        def noted_batch():
            batch = next_batch()
            if trainer._counts:
                note(file, step, batch)
            return batch

        trainer.opened.train.next_batch = noted_batch
        trainer.stop.asked = step + 1 == stop
        try:
            return train_step(trainer, step)
        finally:
            trainer.opened.train.next_batch = next_batch

    Trainer._train_step = watched_step


def note(file: Path, step: int, batch) -> None:
    lines = []
    for row, labels, sample in zip(batch.input_ids, batch.labels, batch.sample_ids, strict=True):
        content = row[:SEQ_LEN].tobytes() + labels[:SEQ_LEN].tobytes()
        lines.append(json.dumps([step, int(sample), hashlib.sha256(content).hexdigest()]) + "\n")
    with file.open("a") as opened:  # appended at once: ranks share the file
        opened.write("".join(lines))


def batches(file: Path) -> list[list]:
    """[step, slot, hash of tokens and labels], sorted."""
    return sorted(json.loads(line) for line in file.read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main())
