"""Readers of question sets: TriviaQA, HotpotQA and WikiHop, each one large JSON file."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from haloformer.data_pipeline.annotated import Annotated, Span
from haloformer.data_pipeline.answers import find_answers
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.json_array import JsonArray
from haloformer.data_pipeline.records import (
    Found,
    LeftOut,
    first_of_each,
    records_of,
    text_of,
    texts_of,
)
from haloformer.data_pipeline.source_files import InputFile, read_text

_EVIDENCE = "evidence"
_YES_NO = "yes no"


def read_triviaqa(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """TriviaQA (Joshi et al. 2017): one example per question and evidence document.

    The documents lie below the folder ``evidence`` beside the file or beside its folder, as in
    triviaqa-rc.tar.gz: ``evidence/wikipedia/NAME`` and ``evidence/web/NAME``. Answers are all
    aliases, wherever they stand in the document as whole words. ``id`` is what TriviaQA scores: the
    question of a Wikipedia file, and of a web file the question and the document.
    """
    evidence = _evidence_folder(file.path)
    for place, record in JsonArray(stream, file, "Data"):
        question = text_of(record, "Question", place, "triviaqa")
        number = text_of(record, "QuestionId", place, "triviaqa")
        answers = _aliases(record, place)
        is_web = "SearchResults" in record
        for name, path in _documents(record, evidence, place):
            origin = f"{file.name}: {number} {name}"
            if path is None:
                yield Found(LeftOut("no evidence file"), origin)
                continue
            with path.open("rb") as opened:
                text = read_text(opened, str(path))
            asked = f"{number}--{name}" if is_web else number
            note = {"id": asked, "document": name, "answers": answers}
            yield Found(Annotated((question, text), note, find_answers(text, answers)), origin)


def _documents(
    record: dict[str, Any], evidence: Path, place: str
) -> Iterator[tuple[str, Path | None]]:
    """Names of a question's documents, and their files where they are there."""
    for folder, key in (("wikipedia", "EntityPages"), ("web", "SearchResults")):
        for page in records_of(record, key, place, "triviaqa") if key in record else []:
            name = text_of(page, "Filename", place, "triviaqa")
            yield name, _find_evidence(evidence / folder, name, place)


def _evidence_folder(path: Path) -> Path:
    places = [folder / _EVIDENCE for folder in path.absolute().parents[:2]]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"there is no folder {' or '.join(map(str, places))}",
        file=path,
        remedy="unpack triviaqa-rc.tar.gz: it holds qa/ and evidence/ side by side",
    )


def _find_evidence(folder: Path, name: str, place: str) -> Path | None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(
            f"the file name {name!r} leads out of the evidence folder",
            file=place,
            remedy="TriviaQA's own files have no such name: fetch the file again",
        )
    # The names are in either form, and so are those of the files once they were unpacked.
    for form in ("NFC", "NFD"):
        path = folder / unicodedata.normalize(form, name)
        if path.is_file():
            return path
    return None


def _aliases(record: dict[str, Any], place: str) -> list[str]:
    answer = record.get("Answer")
    if not isinstance(answer, dict):
        raise _unanswered(place)
    lists = ["Aliases", "NormalizedAliases"] + ["HumanAnswers"] * ("HumanAnswers" in answer)
    texts = [text for key in lists for text in texts_of(answer, key, place, "triviaqa")]
    return first_of_each([text_of(answer, "Value", place, "triviaqa"), *texts])


def read_hotpotqa(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """HotpotQA (Yang et al. 2018): the text is "yes no", then every paragraph with its title.

    So a question of yes or no has a span like any other, and it is the one at the beginning. Other
    answers are found in the paragraphs, all of them. Supporting facts are not used.
    """
    for place, record in JsonArray(stream, file, None):
        question = text_of(record, "question", place, "hotpotqa")
        number = text_of(record, "_id", place, "hotpotqa")
        if "answer" not in record:
            raise _unanswered(place)
        answer = text_of(record, "answer", place, "hotpotqa")
        text = "\n".join(_paragraphs(record.get("context"), place))
        if answer in _YES_NO.split():
            start = _YES_NO.index(answer)
            spans: tuple[Span, ...] = (Span(start, start + len(answer)),)
        else:
            shift = len(_YES_NO) + 1
            spans = tuple(
                Span(shift + start, shift + stop) for start, stop, _ in find_answers(text, [answer])
            )
        note = {"id": number, "answers": [answer]}
        example = Annotated((question, f"{_YES_NO}\n{text}"), note, spans)
        yield Found(example, f"{file.name}: {number}")


def _paragraphs(context: Any, place: str) -> Iterator[str]:
    """Title and sentences of each paragraph; the sentences bring their blanks along."""
    entries = context if isinstance(context, list) else [None]
    for entry in entries:
        match entry:
            case [str(title), [*sentences]] if all(isinstance(s, str) for s in sentences):
                yield f"{title}\n{''.join(sentences)}"
            case _:
                raise DataError(
                    '"context" is no list of [title, [sentences]]',
                    file=place,
                    remedy="is this a file of --format hotpotqa (with distractors)?",
                )


def read_wikihop(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """WikiHop of QAngaroo (Welbl et al. 2018), with the blanks around its punctuation removed."""
    for place, record in JsonArray(stream, file, None):
        number = text_of(record, "id", place, "wikihop")
        query = text_of(record, "query", place, "wikihop")
        candidates = texts_of(record, "candidates", place, "wikihop")
        documents = texts_of(record, "supports", place, "wikihop")
        if "answer" not in record:
            raise _unanswered(place)
        answer = text_of(record, "answer", place, "wikihop")
        if answer not in candidates:
            raise DataError(
                f"the answer {answer!r} is none of the candidates",
                file=place,
                remedy="leave this record out",
            )
        note = {
            "id": number,
            "label": candidates.index(answer),
            "num_candidates": len(candidates),
        }
        documents = [text for text in map(_joined, documents) if text]
        segments = (_joined(query), *map(_joined, candidates), *documents)
        origin = f"{file.name}: {number}"
        yield Found(Annotated(segments, note) if documents else LeftOut("no document"), origin)


def _joined(text: str) -> str:
    """Tokenised text as it is written: ``in Cuba , who`` -> `` in Cuba, who`` (AI2's script).

    With a blank before it, so that a byte-level BPE gives its first word as inside of a text.
    """
    text = " ".join(re.sub(r" (?=[.,!?)]|'s)", "", text).replace("( ", "(").split())
    return f" {text}" if text else ""


def _unanswered(place: str) -> DataError:
    return DataError(
        "there is no answer", file=place, remedy="test files have none; prepare train or dev"
    )
