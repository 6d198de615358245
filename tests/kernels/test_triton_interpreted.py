"""Run interpreted_triton.py in a process of its own, and report each of its tests that failed."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("interpreted_triton.py")
ROOT = Path(__file__).parents[2]


def run_interpreted(tmp_path, marker):
    """Names of the child's tests that passed, and the texts of the others."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(CHILD), "-q", "-m", marker]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--junitxml={report}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    passed, failed = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        troubles = [x for x in case if x.tag in ("failure", "error")]
        passed += [] if troubles else [case.attrib["name"]]
        failed += [f"{case.attrib['name']}: {x.attrib.get('message')}" for x in troubles]
    return passed, failed


def test_the_kernels_equal_the_loops_in_the_interpreter(tmp_path):
    passed, failed = run_interpreted(tmp_path, "not extended")
    assert not failed, "\n".join(failed)
    assert len(passed) >= 45


@pytest.mark.extended
def test_the_kernels_equal_the_loops_on_random_bands(tmp_path):
    passed, failed = run_interpreted(tmp_path, "extended")
    assert not failed, "\n".join(failed)
    assert len(passed) >= 300
