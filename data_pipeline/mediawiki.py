"""MediaWiki XML dumps, streamed: articles only, one page in memory at a time.

Expat is driven by hand: nothing of the tree is kept, and a document type declaration (the only
way to define entities, so to blow up memory or reach for other files) is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.wikitext import clean_wikitext

_CHUNK = 1 << 16
_KEPT = ("title", "ns", "text")


class _Pages:
    """Collects title, namespace and text of each page; finished pages wait in ``ready``."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.ready: list[tuple[str, str]] = []
        self.seen_page = False
        self._path = path
        self._max_bytes = max_bytes
        self._fields: dict[str, list[str]] = {}
        self._current: str | None = None
        self._size = 0
        self._redirect = False
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.StartDoctypeDeclHandler = self._doctype

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "page":
            self.seen_page, self._redirect, self._size = True, False, 0
            self._fields = {key: [] for key in _KEPT}
        elif name == "redirect":
            self._redirect = True
        elif name in _KEPT and self._fields:
            self._current = name
            # A full-history dump holds many revisions; the last one is the newest.
            self._fields[name].clear()

    def _end(self, name: str) -> None:
        if name == self._current:
            self._current = None
        elif name == "page":
            title, namespace, text = ("".join(self._fields[key]) for key in _KEPT)
            is_article = namespace.strip() in ("", "0") and not self._redirect
            if is_article and not text.lstrip()[:9].upper().startswith("#REDIRECT"):
                self.ready.append((title, text))
            self._fields = {}

    def _characters(self, content: str) -> None:
        if self._current is None:
            return
        self._size += len(content)
        if self._size > self._max_bytes:
            raise DataError(
                f"a page is longer than {self._max_bytes} characters",
                file=f"{self._path}:{self.parser.CurrentLineNumber}",
                remedy="this is not a MediaWiki dump of articles",
            )
        self._fields[self._current].append(content)

    def _doctype(self, *_: object) -> None:
        raise DataError(
            "a document type declaration is not accepted",
            file=f"{self._path}:{self.parser.CurrentLineNumber}",
            remedy="MediaWiki dumps have none; remove it",
        )


def iter_articles(
    stream: io.BufferedIOBase, path: Path, max_bytes: int, keep_markup: bool
) -> Iterator[tuple[str, str]]:
    """Read (title, text) of every article: namespace 0, no redirects.

    Args:
        stream: The decompressed XML.
        path: Its name in messages.
        max_bytes: Longest page accepted.
        keep_markup: Give the wikitext as it is, not readable prose.

    Raises:
        DataError: If it is not well-formed, not a dump, or declares a document type.
    """
    pages = _Pages(path, max_bytes)
    while True:
        chunk = stream.read(_CHUNK)
        try:
            pages.parser.Parse(chunk, not chunk)
        except expat.ExpatError as fault:
            raise DataError(
                f"not well-formed XML ({expat.ErrorString(fault.code)})",
                file=f"{path}:{fault.lineno}",
                remedy="the dump is damaged or cut off; fetch it again",
            ) from fault
        ready, pages.ready = pages.ready, []
        for title, text in ready:
            yield title, text if keep_markup else clean_wikitext(text)
        if not chunk:
            break
    if not pages.seen_page:
        raise DataError("holds no <page>", file=path, remedy="is it a MediaWiki dump?")
