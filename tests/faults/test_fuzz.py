"""A short form of fuzz.py, in a process of its own, because audit hooks stay for good."""

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")
ROOT = Path(__file__).parents[2]


def test_no_damaged_shard_or_checkpoint_is_taken_for_what_it_is_not():
    paths = os.pathsep.join((str(ROOT / ".pkg"), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--count", "35", "--seed", "7"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    seen = [line.rpartition(": ")[0] for line in done.stdout.splitlines()]
    for damage in ("flip_bit", "cut", "lose", "grow", "take_another", "take_older", "be_hostile"):
        assert f"shards {damage} refused" in seen
        assert f"examples {damage} refused" in seen
        assert f"checkpoint {damage} refused" in seen
