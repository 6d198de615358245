"""The files that hold a format's records: found in a fixed order, opened, taken apart.

Memory is bounded by one record. Files may be compressed (.gz, .bz2); a folder stands for all files
below it that are of the format.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haloformer.data_pipeline.errors import DataError

COMPRESSED = (".gz", ".bz2")
# One document is tokenised in memory, and its sizes are 32-bit in the offset table.
MAX_DOCUMENT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read, and the name it has in messages and records."""

    path: Path
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class FileRule:
    """Which files of a folder are of a format.

    Attributes:
        suffixes: How they end, compressed or not; none: only files can be named, not folders.
        accepts: Which of them, as paths below the folder.
        order: What they are sorted by.
        example: One of them, where the ending alone does not say it.
    """

    suffixes: tuple[str, ...] = ()
    accepts: Callable[[Path], bool] = lambda _: True
    order: Callable[[Path], Any] = str
    example: str = ""


def expand(inputs: Sequence[Path], rule: FileRule) -> list[InputFile]:
    """Expand files and folders into the list of files to read, in a fixed order.

    Raises:
        DataError: If a path is missing, a folder cannot be read or holds no file of the format,
            or a file is empty.
    """
    found: list[InputFile] = []
    for given in inputs:
        if not given.exists():
            raise DataError("no such file or folder", file=given, remedy="check --input")
        paths = _files_below(given, rule) if given.is_dir() else [given]
        base = given if given.is_dir() else given.parent
        for path in paths:
            size = path.stat().st_size
            if size == 0:
                raise DataError("the file is empty", file=path, remedy="remove it from --input")
            found.append(InputFile(path, str(path.relative_to(base)), size))
    if not found:
        raise DataError("no input was given", remedy="name files or folders with --input")
    return found


def _files_below(folder: Path, rule: FileRule) -> list[Path]:
    if not rule.suffixes:
        raise DataError("it is a folder", file=folder, remedy="name the file of one split itself")
    suffixes = tuple(s + c for s in rule.suffixes for c in ("", *COMPRESSED))
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder, onerror=_refuse_unreadable)
        for name in names
        if name.lower().endswith(suffixes)
    ]
    found = [path for path in found if rule.accepts(path.relative_to(folder))]
    if not found:
        told = (
            f"like {rule.example}" if rule.example else f"that ends in {' or '.join(rule.suffixes)}"
        )
        raise DataError(
            f"the folder holds no file {told}",
            file=folder,
            remedy="name the files themselves, or another --format",
        )
    return sorted(found, key=rule.order)


def _refuse_unreadable(fault: OSError) -> None:
    """``os.walk`` would leave such a folder out without a word."""
    raise DataError(
        f"the folder cannot be read ({fault.strerror})",
        file=fault.filename,
        remedy="make it readable, or name with --input what shall be read",
    ) from fault


def decompressed(raw: io.BufferedIOBase, path: Path) -> io.BufferedIOBase:
    """The content of a file, opened by what its name ends in."""
    if path.suffix.lower() == ".bz2":
        return bz2.BZ2File(raw)
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return raw


def read_text(stream: io.BufferedIOBase, place: str) -> str:
    """All of a stream as text.

    Raises:
        DataError: If it is longer than a document may be, or not UTF-8.
    """
    return _decode(_bounded(stream.read(MAX_DOCUMENT_BYTES + 1), place), place)


def text_lines(stream: io.BufferedIOBase, file: InputFile) -> Iterator[tuple[str, int, str]]:
    """Place, number and text of every line, without the white space around it."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        place = f"{file.path}:{number}"
        yield place, number, _decode(_bounded(line, place), place).strip()


def json_lines(
    stream: io.BufferedIOBase, file: InputFile
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Place, line number and object of every line that is not empty."""
    for place, number, line in text_lines(stream, file):
        if not line:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as fault:  # ValueError: a number of 5,000 digits
            raise DataError(
                f"not JSON ({fault})", file=place, remedy="every line is one JSON object"
            ) from fault
        yield place, number, value if isinstance(value, dict) else {}


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
