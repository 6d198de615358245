"""Large JSON arrays, one record in memory at a time.

Question sets are published as one JSON file of hundreds of megabytes, which as objects take ten
times that. Records are found by decoding: a window grows until it holds the next one whole.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.source_files import InputFile

_MAX_RECORD_CHARACTERS = 1 << 26  # of one record, which is held as text and as objects
_CHUNK = 1 << 16
_BLANKS = re.compile(r"[ \t\n\r]*")


class JsonArray:
    """The records of one large JSON array, one at a time.

    Args:
        stream: The file's content: an array, or an object that holds one.
        file: Its name in messages.
        key: Where in the object the array is; None: the file is the array.
    """

    def __init__(self, stream: io.BufferedIOBase, file: InputFile, key: str | None) -> None:
        self._stream, self._place, self._key = stream, str(file.path), key
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False
        self._number = 0

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and record of each.

        Raises:
            DataError: If it is not such a file, or cut off; naming the record.
        """
        if self._key is None:
            yield from self._records()
        else:
            yield from self._members(self._key)
        if self._next():
            raise self._fault("something follows the end of the JSON")

    def _members(self, wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
        found = False
        self._take("{")
        while self._next() != "}":
            name = self._value()
            self._take(":")
            if name == wanted and not found:
                found = True
                yield from self._records()
            else:
                self._value()
            if self._next() != "}":
                self._take(",")
        self._take("}")
        if not found:
            raise self._fault(f'no key "{wanted}"')

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self._take("[")
        while self._next() != "]":
            self._number += 1
            value = self._value()
            if not isinstance(value, dict):
                raise self._fault("not a JSON object")
            yield f"{self._place}: record {self._number}", value
            if self._next() != "]":
                self._take(",")
        self._take("]")

    def _next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise self._fault(
                f"found {found!r} in place of {character!r}" if found else "the file is cut off"
            )
        self._at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as fault:  # ValueError: a number of 5,000 digits
                # It may only be that its end was not read yet.
                if not isinstance(fault, json.JSONDecodeError) or not self._grow():
                    what = fault.msg if isinstance(fault, json.JSONDecodeError) else str(fault)
                    raise self._fault(f"not JSON ({what})") from fault
            else:
                if end < len(self._text) or not self._grow():  # a number could go on
                    self._at = end
                    return value

    def _grow(self) -> bool:
        """Read as much again as is held; False at the end of the file."""
        held = len(self._text) - self._at
        if self._ended:
            return False
        if held > _MAX_RECORD_CHARACTERS:
            raise self._fault(f"malformed, or longer than {_MAX_RECORD_CHARACTERS} characters")
        content = self._stream.read(max(_CHUNK, held))
        self._ended = not content
        try:
            more = self._bytes.decode(content, final=self._ended)
        except UnicodeDecodeError as fault:
            raise self._fault("bytes that are not UTF-8 follow") from fault
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more) or not self._ended

    def _fault(self, what: str) -> DataError:
        place = f"{self._place}: record {self._number}" if self._number else self._place
        return DataError(what, file=place, remedy="is it whole, and of this --format?")
