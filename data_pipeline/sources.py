"""Streaming readers: the formats that ``prepare`` reads, and what each of them gives.

Memory is bounded by one document (``mediawiki``, ``imdb`` ...) or one record. To add a format:
write a reader, a generator of ``Found``, and name it in ``_FORMATS``.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.arxiv import read_arxiv
from haloformer.data_pipeline.byte_parts import TEXT8, Part, iter_byte_parts
from haloformer.data_pipeline.conll import read_conll2012
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.hyperpartisan import LABELS, ground_truth_of, read_hyperpartisan
from haloformer.data_pipeline.imdb import FILES as REVIEW_FILES
from haloformer.data_pipeline.imdb import read_review, review_labels
from haloformer.data_pipeline.index import Content
from haloformer.data_pipeline.leads import split_lead
from haloformer.data_pipeline.mediawiki import iter_articles
from haloformer.data_pipeline.questions import read_hotpotqa, read_triviaqa, read_wikihop
from haloformer.data_pipeline.records import Body, Found, LeftOut, Pair
from haloformer.data_pipeline.source_files import (
    MAX_DOCUMENT_BYTES,
    FileRule,
    InputFile,
    decompressed,
    expand,
    json_lines,
    read_text,
)

SourceFormat = Literal[
    "text", "jsonl", "mediawiki", "enwik8", "text8", "pairs", "mediawiki_lead", "arxiv",
    "imdb", "hyperpartisan", "triviaqa", "hotpotqa", "wikihop", "conll2012",
]  # fmt: skip
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
_PAIR_KEYS = ("source", "target")


@dataclass(frozen=True, slots=True)
class Document:
    """One sample, where it comes from, and how far the reading has come."""

    body: Body
    origin: str
    bytes_read: int  # of all input files together, compressed as they lie on disk
    part: Part | None = None  # which data set it is for, where the format says so

    @property
    def texts(self) -> tuple[str, ...]:
        """Its texts: one, source and target, or those of an example; none of what is no text."""
        match self.body:
            case str(text):
                return (text,)
            case Pair(source, target):
                return (source, target)
            case Annotated(segments=segments):
                return segments
            case _:
                return ()


def _read_text(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    yield Found(read_text(stream, str(file.path)), file.name)


def _read_jsonl(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    for place, number, value in json_lines(stream, file):
        yield Found(_string(value, "text", place), f"{file.name}:{number}")


def _read_pairs(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    for place, number, value in json_lines(stream, file):
        source, target = (_string(value, key, place, filled=True) for key in _PAIR_KEYS)
        yield Found(Pair(source, target), f"{file.name}:{number}")


def _string(value: dict[str, object], key: str, place: str, *, filled: bool = False) -> str:
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


@dataclass(frozen=True, slots=True)
class _Format:
    """What a format holds, where, and who reads it (None: markup or bytes, see ``_read``)."""

    content: Content
    files: FileRule
    read: Callable[[io.BufferedIOBase, InputFile], Iterator[Found]] | None = None


_JSONL, _XML = FileRule((".jsonl",)), FileRule((".xml",))
_CONLL = FileRule(("_gold_conll",))
_ONE_FILE = FileRule()  # a folder would mix the splits, which lie side by side
_FORMATS: dict[SourceFormat, _Format] = {
    "text": _Format("documents", FileRule((".txt", ".text", ".md")), _read_text),
    "jsonl": _Format("documents", _JSONL, _read_jsonl),
    "mediawiki": _Format("documents", _XML),
    "enwik8": _Format("documents", _ONE_FILE),
    "text8": _Format("documents", _ONE_FILE),
    "pairs": _Format("pairs", _JSONL, _read_pairs),
    "mediawiki_lead": _Format("pairs", _XML),
    "arxiv": _Format("pairs", _ONE_FILE, read_arxiv),
    "imdb": _Format("classification", REVIEW_FILES, read_review),
    "hyperpartisan": _Format("classification", _ONE_FILE, read_hyperpartisan),
    "triviaqa": _Format("questions", _ONE_FILE, read_triviaqa),
    "hotpotqa": _Format("questions", _ONE_FILE, read_hotpotqa),
    "wikihop": _Format("choices", _ONE_FILE, read_wikihop),
    "conll2012": _Format("coreference", _CONLL, read_conll2012),
}


def content_of(source_format: SourceFormat) -> Content:
    """What a format holds."""
    return _FORMATS[source_format].content


def is_bytes(source_format: SourceFormat) -> bool:
    """Whether a format is bytes that are not decoded."""
    return source_format in ("enwik8", "text8")


def find_inputs(inputs: Sequence[Path], source_format: SourceFormat) -> list[InputFile]:
    """The files of a format below some paths: see ``source_files.expand``."""
    return expand(inputs, _FORMATS[source_format].files)


def labels_of(files: Sequence[InputFile], source_format: SourceFormat) -> tuple[str, ...]:
    """The classes of a classification, in the order of their numbers; none of other formats.

    Raises:
        DataError: If there are fewer than two.
    """
    if source_format == "imdb":
        return review_labels(files)
    return LABELS if source_format == "hyperpartisan" else ()


def file_beside(file: InputFile, source_format: SourceFormat) -> Path | None:
    """A second file that is read with an input, so that a change of it is a change of the input.

    The evidence of TriviaQA is not looked at: it is a few hundred thousand files.
    """
    return ground_truth_of(file.path) if source_format == "hyperpartisan" else None


def iter_documents(
    files: Sequence[InputFile],
    source_format: SourceFormat,
    *,
    keep_markup: bool = False,
    holdout: float = 0.0,
) -> Iterator[Document]:
    """Read documents one after the other.

    Args:
        files: From ``find_inputs``.
        source_format: ``text`` (one document per file), ``jsonl`` (key ``text``), ``mediawiki``,
            ``pairs`` (JSONL, keys ``source`` and ``target``), ``mediawiki_lead`` (an article's
            sections and its lead), or a published data set: see the readers.
        keep_markup: Leave wiki markup as it is.
        holdout: Of bytes (``enwik8``, ``text8``) the share at the end for eval, and again for test.

    Yields:
        Documents without a byte-order mark. One whose (last) text is blank is ``LeftOut``.

    Raises:
        DataError: On unreadable content, naming file and line or record.
    """
    if is_bytes(source_format):
        allowed = TEXT8 if source_format == "text8" else None
        for content, part, start in iter_byte_parts(files, holdout, allowed):
            name = f"{files[0].name}: bytes {start}"
            yield Document(content, name, start + len(content), part)
        return
    done = 0
    for file in files:
        try:
            with file.path.open("rb") as raw, decompressed(raw, file.path) as stream:
                for body, place in _read(stream, file, source_format, keep_markup):
                    at = done + min(raw.tell(), file.size)
                    yield _checked(Document(body, place, at))
        except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
            raise _damaged(file, fault) from fault
        except OSError as fault:
            if fault.errno is not None:
                raise
            raise _damaged(file, fault) from fault  # bz2 reports damage as a bare OSError
        done += file.size


def _read(
    stream: io.BufferedIOBase, file: InputFile, source_format: SourceFormat, keep_markup: bool
) -> Iterator[Found]:
    read = _FORMATS[source_format].read
    if read is not None:
        yield from read(stream, file)
    elif source_format == "mediawiki":
        for title, text in iter_articles(stream, file.path, MAX_DOCUMENT_BYTES, keep_markup):
            yield Found(text, f"{file.name}: {title}")
    else:
        for title, text in iter_articles(stream, file.path, MAX_DOCUMENT_BYTES, keep_markup=True):
            pair = split_lead(text, keep_markup=keep_markup)
            if pair is not None:
                yield Found(Pair(*pair), f"{file.name}: {title}")


def _checked(document: Document) -> Document:
    """The document if all of it can be written, and there is something in it to read."""
    texts = document.texts
    for text in texts:
        # JSON may spell half of a surrogate pair, which no UTF-8 text can hold.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise DataError(
                f"character {fault.start} is half of a surrogate pair",
                file=document.origin,
                remedy="write the text as valid Unicode",
            ) from fault
    longest = texts[-1] if isinstance(document.body, Annotated) else "".join(texts[:1])
    if texts and not longest.strip():
        return Document(LeftOut("no text"), document.origin, document.bytes_read)
    return document


def _damaged(file: InputFile, fault: Exception) -> DataError:
    return DataError(
        f"the compressed file is damaged or cut off ({fault})",
        file=file.path,
        remedy="fetch it again",
    )
