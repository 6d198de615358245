"""Pages that tell a whole story, run from top to bottom through the real command line."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from doc_pages import RUNNABLE, RUNNABLE_LONG, Block, Page, pages
from launcher_runs import command

LIMIT_S = 600.0
ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
STORIES = [page.name for page in pages() if page.marked(RUNNABLE)]
LONG_STORIES = [page.name for page in pages() if page.marked(RUNNABLE_LONG)]
BY_NAME = {page.name: page for page in pages()}


def tell(page: Page, folder: Path) -> None:
    """Do what a page tells its reader to do; what it shows must be what is seen."""
    for number, block in enumerate(page.blocks):
        if block.file_name is not None:
            (folder / block.file_name).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            run_python(block, folder, number)
        elif block.language == "console":
            run_console(block, folder)


def run_python(block: Block, folder: Path, number: int) -> None:
    code = folder / f"block_{number}.py"
    code.write_text(block.text, encoding="utf-8")
    done = started([sys.executable, code.name], folder)
    assert done.returncode == 0, done.stderr


def run_console(block: Block, folder: Path) -> None:
    for typed in block.commands():
        line = " ".join(typed.words)
        assert typed.words[0] == "haloformer", f"{line}: a page that runs has no other program"
        done = started(command(typed.words[1:]), folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        shown = typed.output
        same = doctest.OutputChecker().check_output(shown, done.stdout, ALIKE)
        assert not shown.strip() or same, f"{line}\nshown:\n{shown}\nseen:\n{done.stdout}"


def started(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in the reader's folder, with no server and a thread per rank."""
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        words, cwd=folder, env={**inherited, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip


@pytest.mark.parametrize("name", STORIES)
def test_a_short_story_runs_as_it_is_told(name, tmp_path):
    tell(BY_NAME[name], tmp_path)


@pytest.mark.extended
@pytest.mark.parametrize("name", LONG_STORIES)
def test_a_long_story_runs_as_it_is_told(name, tmp_path):
    tell(BY_NAME[name], tmp_path)


def test_there_is_a_short_and_a_long_story():
    assert STORIES and LONG_STORIES
