"""A short form of kill.py, in a process of its own, because it forks."""

import os
import subprocess
import sys
from pathlib import Path

KILL = Path(__file__).with_name("kill.py")


def test_killed_ranks_leave_no_trace_in_losses_weights_or_files():
    done = subprocess.run(
        [sys.executable, str(KILL), "--kills", "8", "--seed", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    died = [line for line in done.stdout.splitlines() if line.startswith("killed at ")]
    assert sum(int(line.rpartition(": ")[2]) for line in died) == 8
