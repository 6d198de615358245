"""What a reader of a published format gives, and how it looks into its JSON records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.errors import DataError


class Pair(NamedTuple):
    """What to write when a source is read."""

    source: str
    target: str


class LeftOut(NamedTuple):
    """A record that is no sample; ``prepare`` counts them by this."""

    why: str


Body = str | bytes | Pair | Annotated | LeftOut


class Found(NamedTuple):
    """One record, and where it comes from."""

    body: Body
    place: str


def text_of(record: Mapping[str, Any], key: str, place: str, source_format: str) -> str:
    """The string under a key.

    Raises:
        DataError: If there is none.
    """
    text = record.get(key)
    if not isinstance(text, str):
        raise _missing("string", key, place, source_format)
    return text


def texts_of(record: Mapping[str, Any], key: str, place: str, source_format: str) -> list[str]:
    """The list of strings under a key.

    Raises:
        DataError: If there is none.
    """
    texts = record.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _missing("list of strings", key, place, source_format)
    return texts


def records_of(
    record: Mapping[str, Any], key: str, place: str, source_format: str
) -> list[dict[str, Any]]:
    """The list of objects under a key.

    Raises:
        DataError: If there is none.
    """
    found = record.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise _missing("list of objects", key, place, source_format)
    return found


def first_of_each(texts: Sequence[str]) -> list[str]:
    """Texts without blanks around them, each once, in the order in which they first come."""
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _missing(what: str, key: str, place: str, source_format: str) -> DataError:
    return DataError(
        f'no {what} under the key "{key}"',
        file=place,
        remedy=f"is this a train or dev file of --format {source_format}?",
    )
