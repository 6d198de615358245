"""walk.py, in a process of its own, because it forks."""

import os
import subprocess
import sys
from pathlib import Path

WALK = Path(__file__).with_name("walk.py")


def test_four_layouts_in_turn_see_the_batches_and_losses_of_one_rank():
    done = subprocess.run(
        [sys.executable, str(WALK)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "64 steps, 256 sequences as on one rank" in done.stdout
