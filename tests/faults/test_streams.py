"""The untimed parts of streams.py, in a process of its own, because audit hooks stay for good."""

import re
import subprocess
import sys
from pathlib import Path

STREAMS = Path(__file__).with_name("streams.py")
SMALL = ["--steps", "2000", "--tokens", "400000", "--seq-len", "512"]
# The script's own check, on a stream that keeps a little of every batch.
LEAK = f"""
import importlib.util
import sys
spec = importlib.util.spec_from_file_location("streams", {str(STREAMS)!r})
streams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(streams)

class Leaking:
    kept = []
    def next_batch(self):
        self.kept.append(bytearray(b"x" * 24_000))
    def state_dict(self):
        return {{"0": [0, 0, 0, 0]}}

sys.exit(streams.check_memory(Leaking(), 2000, print))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=180)


def test_memory_is_flat_and_resume_costs_the_same_everywhere() -> None:
    done = run(str(STREAMS), "--untimed", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == ["resume: holds", "memory: holds"]
    assert "memory: step 2000" in done.stdout and "speed" not in done.stdout


def test_a_leak_is_seen() -> None:
    done = run("-c", LEAK)
    assert done.returncode == 0, f"check_memory held: {done.stdout}{done.stderr}"
    growth = re.search(r"memory: step 2000: \+([\d.]+) MiB", done.stdout)
    # Linux counts the pages of a process to some dozens for each core.
    assert growth is not None and 18 < float(growth[1]) < 28, done.stdout  # 22.9 are kept
