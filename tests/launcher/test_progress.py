"""What a step's line says, in a pipe."""

import os
import pty
import selectors
import subprocess
import sys

import pytest

from haloformer.launcher.progress import StepProgress

VALUES = {"loss": 6.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 9000.0}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, "step 10/20  loss 6.5000  grad 0.50  lr 1.00e-03  9,000 tok/s\n"),
        ({"bits_per_char": 2.0}, "loss 6.5000  bits/char 2.000  grad"),
        ({"cut_sources": 1.0, "cut_targets": 0.0}, "tok/s  cut: 1 sources, 0 targets\n"),
        ({"cut_sources": 0.0, "cut_targets": 0.0}, "9,000 tok/s\n"),
        ({"num_skipped": 3.0}, "tok/s  skipped: 3 damaged\n"),
        ({"num_skipped": 0.0}, "9,000 tok/s\n"),
    ],
)
def test_a_step_is_one_line_that_says_what_was_cut_or_skipped(more, line, capsys) -> None:
    with StepProgress(20, 0, every=10) as progress:
        progress.step(9, VALUES)
        assert capsys.readouterr().out == ""
        progress.step(10, {**VALUES, **more})
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("columns", [50, 80])
def test_a_narrow_terminal_shows_the_step_and_the_loss(columns, monkeypatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    shown = b""
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        with StepProgress(150, 30, every=1) as progress:
            progress.step(31, VALUES)
        with selectors.DefaultSelector() as waiting:
            waiting.register(ours, selectors.EVENT_READ)
            while waiting.select(0.5):
                shown += os.read(ours, 1 << 16)
    os.close(ours)
    assert b"31/150" in shown and b"loss 6.5" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_goes_on_when_nobody_reads_any_more(terminal: bool) -> None:
    program = (
        "from haloformer.launcher.progress import StepProgress\n"
        f"values = {VALUES}\n"
        "with StepProgress(9, 0, every=1) as progress:\n"
        "    input()\n"
        "    for step in range(1, 9):\n"
        "        progress.step(step, values)\n"
        "        progress.say('step: checkpoint committed')\n"
        "raise SystemExit(7)\n"
    )
    ours, theirs = pty.openpty() if terminal else os.pipe()
    rank = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    os.close(ours)
    rank.communicate(b"go on\n", timeout=60)
    assert rank.returncode == 7


def test_a_line_that_looks_like_markup_is_shown_as_it_is(monkeypatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        with StepProgress(9, 0, every=1) as progress:
            progress.say("warning: no room in [/data/runs]")
        assert b"no room in [/data/runs]" in os.read(ours, 1 << 16)
    os.close(ours)
