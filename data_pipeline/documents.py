"""The texts that a trained model is asked about: one per line, or JSON lines.

Only a line at a time is in memory. A document knows its line, so that a fault can name it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from haloformer.data_pipeline.errors import DataError

_KEYS = ("source", "text")


class Asked(NamedTuple):
    """A text, and where it is: ``file:line``, and the line's number from 1 up."""

    text: str
    place: str
    line: int


def read_asked(path: Path) -> Iterator[Asked]:
    """Read documents.

    Args:
        path: ``.jsonl``: an object per line, the document under ``source`` (as in pairs) or
            ``text``; empty lines are passed over. Any other name: a document per line, and an
            empty line is an empty document.

    Raises:
        DataError: If there is no such file, a line is not UTF-8, or holds no document.
    """
    if not path.is_file():
        raise DataError("no such file", file=path, remedy="check --input")
    as_json = path.suffix == ".jsonl"
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as fault:
                raise DataError(
                    f"byte {fault.start} is not UTF-8",
                    file=place,
                    remedy="convert the file to UTF-8",
                ) from fault
            if not as_json:
                yield Asked(line, place, number)
            elif line.strip():
                yield Asked(_document(line, place), place, number)


def _document(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise DataError(
            f"not JSON ({fault})", file=place, remedy="every line is one JSON object"
        ) from fault
    found = [value[key] for key in _KEYS if key in value] if isinstance(value, dict) else []
    if not found or not isinstance(found[0], str):
        raise DataError(
            f"no text under {' or '.join(repr(key) for key in _KEYS)}",
            file=place,
            remedy="a line is a JSON object with the document under one of these keys",
        )
    return found[0]
