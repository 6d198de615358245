"""The examples run as they are, are short, and the quick start shows them word for word."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys

import pytest

from doc_pages import ROOT, Page

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 20
LIMIT_S = 120.0
_LOSS = re.compile(r"^step (\d+): loss ([\d.]+)$", re.MULTILINE)


def losses_of(output: str) -> list[float]:
    """The losses that an example printed, one for each step."""
    found = _LOSS.findall(output)
    assert [int(step) for step, _ in found] == list(range(len(found)))
    return [float(loss) for _, loss in found]


def torchrun(name: str, num_ranks: int) -> list[float]:
    words = ["--standalone", "--nproc-per-node", str(num_ranks), str(ROOT / "examples" / name)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return losses_of(done.stdout)


def test_the_op_learns_to_copy_its_input(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(ROOT / "examples" / "op.py"))
    losses = losses_of(capsys.readouterr().out)
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]


def test_a_model_learns_under_ddp():
    losses = torchrun("model_ddp.py", 2)
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)


def test_ranks_that_share_a_sequence_have_the_losses_of_one_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shared = torchrun("model_context.py", 2)
    alone_here = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone_here.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "examples" / "model_context.py"))
    alone = losses_of(capsys.readouterr().out)
    assert len(alone) == 5 and alone[-1] < alone[0]
    assert shared == pytest.approx(alone, abs=0.0015)  # they are printed with three digits


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_a_docstring_and_twenty_lines_at_most_after_its_imports(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    head = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    code = source.splitlines()[head[-1].end_lineno :]
    assert len([line for line in code if line.strip()]) <= LONGEST


def test_the_quick_start_shows_every_example_as_it_is():
    blocks = Page(ROOT / "docs" / "quickstart.md").blocks
    shown = {block.text for block in blocks if block.language.startswith("python")}
    assert shown == {path.read_text(encoding="utf-8") for path in EXAMPLES}
