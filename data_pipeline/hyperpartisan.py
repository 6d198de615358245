"""Hyperpartisan news (SemEval-2019 task 4): articles in one XML file, their labels in another.

    articles-training-byarticle-20181122.xml        <articles><article id title published-at> text
    ground-truth-training-byarticle-20181122.xml    <ground-truth><article id hyperpartisan ..>

Articles are streamed; of the ground truth an id and a bit are kept for each. As with dumps expat is
driven by hand, and a document type declaration, so every entity of a file's own, is refused.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.parsers import expat

from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.records import Found
from haloformer.data_pipeline.source_files import InputFile, decompressed

LABELS = ("false", "true")
_CHUNK = 1 << 16
_MAX_ARTICLE_CHARACTERS = 1 << 24
_REMEDY = "is it a file of SemEval-2019 task 4, as it was published?"
_BLOCKS = ("p", "br", "li", "div", "h1", "h2", "h3", "h4", "tr", "blockquote")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")


def ground_truth_of(path: Path) -> Path:
    """The file of labels that belongs to a file of articles.

    Raises:
        DataError: If there is none.
    """
    found = path.with_name(path.name.replace("articles-", "ground-truth-", 1))
    if found == path or not found.is_file():
        raise DataError(
            f"there is no {found.name} beside it" if found != path else "not named articles-*.xml",
            file=path,
            remedy="name a file articles-*.xml with its ground-truth-*.xml beside it",
        )
    return found


def read_hyperpartisan(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """Articles: title, then text; the label says whether they are hyperpartisan."""
    truth = _read_truth(ground_truth_of(file.path))
    number = 0
    for name, text in _read_articles(stream, file.path):
        number += 1
        if name not in truth:
            raise DataError(
                f"article {name!r} is not in {ground_truth_of(file.path).name}",
                file=file.path,
                remedy="the two files belong to different parts of the data",
            )
        note = {"id": name, "label": LABELS[truth[name]]}
        yield Found(Annotated((text,), note), f"{file.name}: {name}")
    if not number:
        raise DataError("holds no <article>", file=file.path, remedy="is it a file of articles?")


def _read_truth(path: Path) -> dict[str, bool]:
    truth: dict[str, bool] = {}

    def start(name: str, attributes: dict[str, str]) -> None:
        if name == "article":
            value = attributes.get("hyperpartisan")
            if value not in LABELS or "id" not in attributes:
                raise DataError(
                    f"an <article> with hyperpartisan={value!r}, not true or false, or without id",
                    file=f"{path}:{parser.CurrentLineNumber}",
                    remedy=_REMEDY,
                )
            truth[attributes["id"]] = value == "true"

    parser = _parser(path, start)
    with path.open("rb") as raw, decompressed(raw, path) as stream:
        for _ in _parse(stream, parser, path):
            pass
    return truth


class _Articles:
    """Collects id, title and text of each article; finished ones wait in ``ready``."""

    def __init__(self, path: Path) -> None:
        self.ready: list[tuple[str, str]] = []
        self._path, self._name, self._size = path, "", 0
        self._parts: list[str] | None = None
        self.parser = _parser(path, self._start)
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "article":
            if "id" not in attributes:
                raise DataError("an <article> without id", file=self._place, remedy=_REMEDY)
            self._name, self._size = attributes["id"], 0
            self._parts = [attributes.get("title", ""), "\n"]
        elif name in _BLOCKS and self._parts is not None:
            self._parts.append("\n")

    def _end(self, name: str) -> None:
        if self._parts is None:
            return
        if name == "article":
            self.ready.append((self._name, _plain("".join(self._parts))))
            self._parts = None
        elif name in _BLOCKS:
            self._parts.append("\n")

    def _characters(self, content: str) -> None:
        if self._parts is None:
            return
        self._size += len(content)
        if self._size > _MAX_ARTICLE_CHARACTERS:
            raise DataError(
                f"an article is longer than {_MAX_ARTICLE_CHARACTERS} characters",
                file=self._place,
                remedy=_REMEDY,
            )
        self._parts.append(content)

    @property
    def _place(self) -> str:
        return f"{self._path}:{self.parser.CurrentLineNumber}"


def _plain(text: str) -> str:
    """Readable text: the XML is resolved, and some articles hold escaped HTML."""
    text = html.unescape(_TAG.sub(" ", html.unescape(text)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _read_articles(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, str]]:
    articles = _Articles(path)
    for _ in _parse(stream, articles.parser, path):
        ready, articles.ready = articles.ready, []
        yield from ready


def _parser(path: Path, start: Callable[[str, dict[str, str]], None]) -> expat.XMLParserType:
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start

    def refuse(*_: object) -> None:
        raise DataError(
            "a document type declaration is not accepted",
            file=f"{path}:{parser.CurrentLineNumber}",
            remedy="the published files have none; remove it",
        )

    parser.StartDoctypeDeclHandler = refuse
    return parser


def _parse(stream: io.BufferedIOBase, parser: expat.XMLParserType, path: Path) -> Iterator[None]:
    """Feed a parser, and stop after each chunk."""
    while True:
        chunk = stream.read(_CHUNK)
        try:
            parser.Parse(chunk, not chunk)
        except expat.ExpatError as fault:
            raise DataError(
                f"not well-formed XML ({expat.ErrorString(fault.code)})",
                file=f"{path}:{fault.lineno}",
                remedy="the file is damaged or cut off; fetch it again",
            ) from fault
        yield
        if not chunk:
            return
