"""Streaming readers: text files, JSONL and MediaWiki XML -> documents, or pairs of texts.

Memory is bounded by one document. Files may be compressed (.gz, .bz2); a folder stands for all
files below it that carry a suffix of the format, in the order of their names.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import Content
from haloformer.data_pipeline.leads import split_lead
from haloformer.data_pipeline.mediawiki import iter_articles

SourceFormat = Literal["text", "jsonl", "mediawiki", "pairs", "mediawiki_lead"]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
_SUFFIXES: dict[SourceFormat, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl",),
    "mediawiki": (".xml",),
    "pairs": (".jsonl",),
    "mediawiki_lead": (".xml",),
}
_PAIR_KEYS = ("source", "target")
_COMPRESSED = (".gz", ".bz2")
# One document is tokenised in memory, and its sizes are 32-bit in the offset table.
MAX_DOCUMENT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read, and the name it has in messages and records."""

    path: Path
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Document:
    """One text, where it comes from, and how far the reading has come."""

    text: str
    origin: str
    bytes_read: int  # of all input files together, compressed as they lie on disk
    target: str | None = None  # of a pair: what to write when ``text`` is read


class _Found(NamedTuple):
    text: str
    place: str
    target: str | None = None


def content_of(source_format: SourceFormat) -> Content:
    """What a format holds."""
    return "pairs" if source_format in ("pairs", "mediawiki_lead") else "documents"


def find_inputs(inputs: Sequence[Path], source_format: SourceFormat) -> list[InputFile]:
    """Expand files and folders into the list of files to read, in a fixed order.

    Raises:
        DataError: If a path is missing, a folder holds no file of the format, or a file is empty.
    """
    found: list[InputFile] = []
    for given in inputs:
        if not given.exists():
            raise DataError("no such file or folder", file=given, remedy="check --input")
        paths = _files_below(given, source_format) if given.is_dir() else [given]
        base = given if given.is_dir() else given.parent
        for path in paths:
            size = path.stat().st_size
            if size == 0:
                raise DataError("the file is empty", file=path, remedy="remove it from --input")
            found.append(InputFile(path, str(path.relative_to(base)), size))
    if not found:
        raise DataError("no input was given", remedy="name files or folders with --input")
    return found


def _files_below(folder: Path, source_format: SourceFormat) -> list[Path]:
    suffixes = tuple(s + c for s in _SUFFIXES[source_format] for c in ("", *_COMPRESSED))
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(suffixes)
    ]
    if not found:
        raise DataError(
            f"the folder holds no file that ends in {' or '.join(_SUFFIXES[source_format])}",
            file=folder,
            remedy="name the files themselves, or another --format",
        )
    return sorted(found)


def iter_documents(
    files: Sequence[InputFile], source_format: SourceFormat, *, keep_markup: bool = False
) -> Iterator[Document]:
    """Read documents one after the other.

    Args:
        files: From ``find_inputs``.
        source_format: ``text`` (one document per file), ``jsonl`` (key ``text``), ``mediawiki``,
            ``pairs`` (JSONL, keys ``source`` and ``target``) or ``mediawiki_lead`` (an article's
            sections and its lead).
        keep_markup: Leave wiki markup as it is.

    Yields:
        Non-empty documents, without a byte-order mark.

    Raises:
        DataError: On unreadable content, naming file and line.
    """
    done = 0
    for file in files:
        try:
            with file.path.open("rb") as raw, _decompressed(raw, file.path) as stream:
                for text, place, target in _read(stream, file, source_format, keep_markup):
                    if text.strip():
                        for part in (text, target):
                            _check_text(part, place)
                        yield Document(text, place, done + min(raw.tell(), file.size), target)
        except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
            raise _damaged(file, fault) from fault
        except OSError as fault:
            if fault.errno is not None:
                raise
            raise _damaged(file, fault) from fault  # bz2 reports damage as a bare OSError
        done += file.size


def _damaged(file: InputFile, fault: Exception) -> DataError:
    return DataError(
        f"the compressed file is damaged or cut off ({fault})",
        file=file.path,
        remedy="fetch it again",
    )


def _decompressed(raw: io.BufferedIOBase, path: Path) -> io.BufferedIOBase:
    if path.suffix.lower() == ".bz2":
        return bz2.BZ2File(raw)
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return raw


def _read(
    stream: io.BufferedIOBase, file: InputFile, source_format: SourceFormat, keep_markup: bool
) -> Iterator[_Found]:
    if source_format == "text":
        content = _bounded(stream.read(MAX_DOCUMENT_BYTES + 1), str(file.path))
        yield _Found(_decode(content, str(file.path)), file.name)
    elif source_format == "jsonl":
        for place, number, value in _json_lines(stream, file):
            yield _Found(_string(value, "text", place), f"{file.name}:{number}")
    elif source_format == "pairs":
        for place, number, value in _json_lines(stream, file):
            source, target = (_string(value, key, place, filled=True) for key in _PAIR_KEYS)
            yield _Found(source, f"{file.name}:{number}", target)
    elif source_format == "mediawiki":
        for title, text in iter_articles(stream, file.path, MAX_DOCUMENT_BYTES, keep_markup):
            yield _Found(text, f"{file.name}: {title}")
    else:
        for title, text in iter_articles(stream, file.path, MAX_DOCUMENT_BYTES, keep_markup=True):
            pair = split_lead(text, keep_markup=keep_markup)
            if pair is not None:
                yield _Found(pair[0], f"{file.name}: {title}", pair[1])


def _json_lines(
    stream: io.BufferedIOBase, file: InputFile
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Place, line number and object of every line that is not empty."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        place = f"{file.path}:{number}"
        content = _decode(_bounded(line, place), place).strip()
        if not content:
            continue
        try:
            value = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as fault:
            raise DataError(
                f"not JSON ({fault})", file=place, remedy="every line is one JSON object"
            ) from fault
        yield place, number, value if isinstance(value, dict) else {}


def _string(value: dict[str, Any], key: str, place: str, *, filled: bool = False) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        keys = _PAIR_KEYS if key in _PAIR_KEYS else (key,)
        example = ", ".join(f'"{name}": "..."' for name in keys)
        raise DataError(
            f'no string under the key "{key}"',
            file=place,
            remedy=f"every line is one object like {{{example}}}",
        )
    if filled and not text.strip():
        raise DataError(
            f'"{key}" is empty', file=place, remedy="remove the line: it is no pair to learn from"
        )
    return text


def _bounded(content: bytes, place: str) -> bytes:
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"one document is longer than {MAX_DOCUMENT_BYTES} bytes",
            file=place,
            remedy="split it into several documents",
        )
    return content


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(
            f"byte {fault.start} is not UTF-8", file=place, remedy="convert the file to UTF-8"
        ) from fault


def _check_text(text: str | None, place: str) -> None:
    if text is None:
        return
    # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise DataError(
            f"character {fault.start} is half of a surrogate pair",
            file=place,
            remedy="write the text as valid Unicode",
        ) from fault
