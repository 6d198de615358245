"""The pages of the documentation as tests see them: their blocks, commands and files.

Conventions of a page:

    ```console        lines that begin with "$ " are commands, the others what they print
    ```yaml           the recipe "# NAME.yaml: what it is" of its first line, for the commands below
    ```text           another file that the reader writes, if its first line is "# NAME: ..."
    ```python         runs as it stands, after those before it; "python no-run" is only compiled
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = "<!-- runnable -->"
RUNNABLE_LONG = "<!-- runnable, long -->"

_FENCE = re.compile(r"^```([\w -]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r"^# ([\w.-]+): ")
_SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Command:
    """A command of a page, its words, and the lines that the page shows below it."""

    words: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """The file that the reader is told to write, None if it is no file."""
        title = _TITLE.match(self.text) if self.language in ("yaml", "text") else None
        return None if title is None else title[1]

    def commands(self) -> list[Command]:
        """What is typed in a console block."""
        found: list[Command] = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            typed, _, output = part.replace("\\\n", " ").partition("\n")
            found.append(Command(tuple(shlex.split(typed, comments=True)), output))
        return found


@dataclass(frozen=True)
class Page:
    """A Markdown file of the repository."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[Block]:
        return [Block(match[1], match[2]) for match in _FENCE.finditer(self.text)]

    @property
    def prose(self) -> str:
        """All but the blocks."""
        return _FENCE.sub("", self.text)

    @property
    def spans(self) -> list[str]:
        """What stands in backticks, on one line each."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]

    def python(self) -> str:
        """The code of this page that runs."""
        return "\n".join(block.text for block in self.blocks if block.language == "python")

    def commands(self) -> list[Command]:
        """All that is typed on this page; the README has plain blocks without a prompt."""
        consoles = [block for block in self.blocks if block.language == "console"]
        found = [command for block in consoles for command in block.commands()]
        for block in self.blocks:
            if not block.language and "$ " not in block.text:
                lines = block.text.replace("\\\n", " ").splitlines()
                typed = [line for line in lines if line.startswith("haloformer ")]
                found += [Command(tuple(shlex.split(line, comments=True)), "") for line in typed]
        return found

    def write_files(self, folder: Path) -> None:
        """Write what the reader is told to write."""
        for block in self.blocks:
            if block.file_name is not None:
                (folder / block.file_name).write_text(block.text, encoding="utf-8")

    def marked(self, mark: str) -> bool:
        """Whether the line below the title is this mark."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return len(lines) > 1 and lines[1] == mark


def pages() -> list[Page]:
    """The README and every page of docs/, in a fixed order."""
    return [Page(ROOT / "README.md"), *map(Page, sorted((ROOT / "docs").rglob("*.md")))]


def recipe_heads() -> dict[str, list[Command]]:
    """The commands in the comments of the recipes that ship, by file."""
    found = {}
    for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = "\n".join(line[1:].strip() for line in lines if line.startswith("#"))
        typed = comment.replace("\\\n", " ").splitlines()
        words = [shlex.split(line) for line in typed if line.startswith("haloformer ")]
        found[path.name] = [Command(tuple(command), "") for command in words]
    return found


@cache
def messages_of_the_code() -> tuple[str, ...]:
    """Every text in our code, a gap of an f-string cutting it in two."""
    found: list[str] = []
    for folder in ("configs", "data_pipeline", "kernels", "launcher", "model"):
        for path in (ROOT / folder).rglob("*.py"):
            found += _texts(ast.parse(path.read_text(encoding="utf-8")))
    return tuple(found)


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
