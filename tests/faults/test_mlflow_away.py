"""The stories of mlflow_away.py; tests/launcher/test_served.py plays one of them by default."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mlflow_away.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.extended
@pytest.mark.parametrize("story", ["start", "late", "during", "killed"])
def test_mlflow_has_all_of_a_run_once_whenever_it_was_away(story: str) -> None:
    paths = os.pathsep.join((str(ROOT / ".pkg"), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--story", story],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
