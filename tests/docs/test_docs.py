"""The pages say what is true: commands parse, recipes load, code runs, links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from collections.abc import Sequence

import pytest
from pydantic import BaseModel

from doc_pages import (
    ROOT,
    RUNNABLE,
    RUNNABLE_LONG,
    Block,
    Command,
    Page,
    messages_of_the_code,
    pages,
    recipe_heads,
)
from haloformer.configs.load import check_world, load_config
from haloformer.configs.models import MODEL_CONFIGS
from haloformer.configs.schema import TrainConfig
from haloformer.launcher.cli import COMMANDS, build_parser
from haloformer.launcher.hosts import num_slots, read_hostfile

PAGES = {page.name: page for page in pages()}
HEADS = recipe_heads()
# The README's example needs tensors of the reader's; stories run as a whole, in test_runnable.
STORIES = [n for n, p in PAGES.items() if p.marked(RUNNABLE) or p.marked(RUNNABLE_LONG)]
WITH_PYTHON = [n for n, p in PAGES.items() if p.python() and n not in ("README.md", *STORIES)]
LONGEST_PAGE = 140

# A path of the repository: one of its folders, then something with an ending, or a folder in it.
_FOLDERS = "configs|data_pipeline|docs|experiments|kernels|launcher|model|tests"
_PATH = re.compile(rf"(?<![\w/.])(?:{_FOLDERS})/[\w./-]*\w")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_KEY = re.compile(r"^([a-z_]+)\.([a-z_]+)(?:: ?.*)?$")
_SHOWN = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)


def named(page: str) -> Page:
    return PAGES[page]


def typed_commands(commands: Sequence[Command]) -> list[Sequence[str]]:
    """The words of each haloformer command, without what stands for something else."""
    typed = [command.words for command in commands]
    return [
        [word for word in words[1:] if not re.search(r"^\[|\]$|\.\.\.", word)]
        for words in typed
        if words[0] == "haloformer"
    ]


@pytest.mark.parametrize("name", [*PAGES, *HEADS])
def test_every_command_is_one_that_the_command_line_takes(name, capsys):
    for words in typed_commands(HEADS[name] if name in HEADS else named(name).commands()):
        try:
            build_parser(words[0]).parse_args(words)
        except SystemExit:
            pytest.fail(f"haloformer {' '.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_the_text_name_what_exists(name):
    for span in named(name).spans:
        words = span.split()
        if words[0] == "haloformer" and len(words) > 1:
            assert words[1] in COMMANDS, span
            options = [word for word in words if word.startswith("--")]
            before = words[1 : words.index(options[0])] if options else []
            help_of_it = _help_of(before) if options else ""
            assert all(option in help_of_it for option in options), span


def _help_of(words: Sequence[str]) -> str:
    """The help of a command, such as that of ``data verify``."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        build_parser(words[0]).parse_args([*words, "--help"])
    return shown.getvalue()


@pytest.mark.parametrize("name", [*PAGES, *HEADS])
def test_every_recipe_loads_with_its_overrides_and_fits_its_ranks(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in PAGES:
        named(name).write_files(tmp_path)
    for words in typed_commands(HEADS[name] if name in HEADS else named(name).commands()):
        if words[0] not in ("train", "plan") or "RECIPE" in words[1]:
            continue
        arguments = build_parser(words[0]).parse_args(words)
        config = load_config(arguments.config, arguments.overrides)
        for ranks in (getattr(arguments, "ranks", None), getattr(arguments, "world", None)):
            if ranks is not None:
                check_world(config, ranks)
        hosts = getattr(arguments, "hostfile", None)
        if hosts is not None and hosts.exists() and getattr(arguments, "ranks", None) is None:
            check_world(config, num_slots(read_hostfile(hosts)))


@pytest.mark.parametrize("name", PAGES)
def test_every_whole_recipe_of_a_page_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = named(name)
    page.write_files(tmp_path)
    for block in page.blocks:
        if block.language == "yaml" and block.file_name is not None:
            load_config(block.file_name)


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_runs_and_prints_what_the_page_says(name, tmp_path, monkeypatch):
    page = named(name)
    monkeypatch.chdir(tmp_path)
    code = page.python()
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        runpy.run_path("page.py")
    assert shown.getvalue().splitlines() == _SHOWN.findall(code)


@pytest.mark.parametrize("name", PAGES)
def test_python_that_is_not_run_is_python_at_least(name):
    for block in named(name).blocks:
        if block.language.startswith("python"):
            compile(block.text, name, "exec")


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    page = named(name)
    for target in _LINK.findall(page.prose):
        if not re.match(r"https?://", target):
            path, _, heading = target.partition("#")
            found = page.path if not path else (page.path.parent / path).resolve()
            assert found.exists(), target
            if heading:
                assert heading in _headings(found.read_text(encoding="utf-8")), target


def _headings(text: str) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_path_of_the_repository_exists(name):
    for span in named(name).spans:
        for path in _PATH.findall(span):
            assert (ROOT / path).exists(), span


@pytest.mark.parametrize("name", PAGES)
def test_every_key_of_a_recipe_exists(name):
    for span in named(name).spans:
        match = _KEY.match(span)
        section = None if match is None else TrainConfig.model_fields.get(match[1])
        if match is not None and section is not None:
            assert match[2] in _keys(match[1]), span


def _keys(section: str) -> set[str]:
    """Keys of a section; those of a model are the keys of all kinds."""
    if section == "model":
        return {key for kind in MODEL_CONFIGS.values() for key in kind.model_fields}
    annotation = TrainConfig.model_fields[section].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return set(annotation.model_fields)


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/")])
def test_every_page_is_short_plain_and_in_the_index(name):
    lines = named(name).text.splitlines()
    assert len(lines) <= LONGEST_PAGE
    assert lines[0].startswith("# ")
    assert named(name).text.isascii()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 110
    index = PAGES["docs/README.md"]
    linked = {(index.path.parent / target).resolve() for target in _LINK.findall(index.prose)}
    assert name == index.name or (ROOT / name).resolve() in linked


def test_every_error_of_the_troubleshooting_page_is_one_of_the_code():
    page = PAGES["docs/troubleshooting.md"]
    shown = [block.text for block in page.blocks if block.language == "text"]
    assert shown
    for text in shown:
        for part in re.split(r"\.\.\.|; ", " ".join(text.split())):
            piece = part.strip()
            assert any(piece in message for message in messages_of_the_code()), piece


def test_what_the_tests_look_for_is_found():
    commands = [words for page in PAGES.values() for words in typed_commands(page.commands())]
    assert {words[0] for words in commands} >= {"prepare", "train", "evaluate", "export"}
    typed = Block("console", "$ haloformer doctor \\\n  --hostfile hosts  # all\nall well\n")
    assert typed.commands() == [
        Command(("haloformer", "doctor", "--hostfile", "hosts"), "all well\n")
    ]
