"""CoNLL-2012 (OntoNotes): a word a line, the last column says where mentions begin and end.

    #begin document (nw/wsj/00/wsj_0020); part 000
    nw/wsj/00/wsj_0020   0   0   Ann   NNP  ...  -   (3)       "Ann" is a mention of entity 3
    nw/wsj/00/wsj_0020   0   1   saw   VBD  ...  -   -
    nw/wsj/00/wsj_0020   0   2   her   PRP$ ...  -   (3)|(7    of 3; a mention of 7 begins
    nw/wsj/00/wsj_0020   0   3   dog   NN   ...  -   7)        and ends

    #end document

Words are joined by blanks, sentences too. Speakers and parses are not used.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from haloformer.data_pipeline.annotated import Annotated, Span
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.records import Found
from haloformer.data_pipeline.source_files import InputFile, text_lines

_BEGIN = re.compile(r"#begin document \((.+)\); part ([0-9]+)")
_END = "#end document"
_MIN_COLUMNS = 12
_WORD = 3
_NO_MENTION = ("-", "*")
_MARK = re.compile(r"(\()?([0-9]+)(\))?")


@dataclass(slots=True)
class _Part:
    """One part of a document, as far as it was read."""

    name: str
    words: list[str] = field(default_factory=list)
    length: int = 0  # characters of the words, joined
    clusters: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    open: dict[int, list[int]] = field(default_factory=dict)  # starts of mentions, innermost last

    def add(self, word: str, column: str, place: str) -> None:
        start = self.length + (1 if self.words else 0)
        self.words.append(word)
        self.length = start + len(word)
        for mark in [] if column in _NO_MENTION else column.split("|"):
            match = _MARK.fullmatch(mark)
            if match is None or not (match[1] or match[3]):
                raise _not_conll(f"{mark!r} is no mark of a mention, such as (3 or 3)", place)
            entity = int(match[2])
            if match[1]:
                self.open.setdefault(entity, []).append(start)
            if match[3]:
                if not self.open.get(entity):
                    raise _not_conll(f"a mention of {entity} ends that never began", place)
                mention = (self.open[entity].pop(), self.length)
                self.clusters.setdefault(entity, set()).add(mention)

    def example(self, place: str) -> Annotated:
        unfinished = [entity for entity, starts in self.open.items() if starts]
        if unfinished:
            raise _not_conll(f"a mention of {unfinished[0]} never ends", place)
        spans = [
            Span(*mention, number)
            for number, cluster in enumerate(_merged(list(self.clusters.values())))
            for mention in sorted(cluster)
        ]
        return Annotated((" ".join(self.words),), {"id": self.name}, tuple(spans))


def _merged(clusters: list[set[tuple[int, int]]]) -> list[set[tuple[int, int]]]:
    """Clusters that share a mention are one; the annotators made a few of these."""
    merged: list[set[tuple[int, int]]] = []
    for cluster in clusters:
        apart = [other for other in merged if not other & cluster]
        joined = [other for other in merged if other & cluster]
        merged = [*apart, cluster.union(*joined)]
    return merged


def read_conll2012(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """The parts of documents with their clusters of mentions; ``id`` is "document part"."""
    part: _Part | None = None
    place = str(file.path)
    for place, _, line in text_lines(stream, file):
        if line.startswith("#begin document"):
            match = _BEGIN.fullmatch(line)
            if part is not None or match is None:
                raise _not_conll("a document begins in another, or without a name", place)
            part = _Part(f"{match[1]} {match[2]}")
        elif line.startswith(_END):
            if part is None:
                raise _not_conll("a document ends that never began", place)
            yield Found(part.example(place), f"{file.name}: {part.name}")
            part = None
        elif line and not line.startswith("#"):
            columns = line.split()
            if part is None or len(columns) < _MIN_COLUMNS:
                raise _not_conll(f"{len(columns)} columns, not {_MIN_COLUMNS} or more", place)
            word = columns[_WORD]
            # Two marks of the treebank, as the usual scripts write them (Lee et al. 2017).
            part.add(word[1:] if word in ("/.", "/?") else word, columns[-1], place)
    if part is not None:
        raise _not_conll(f"the file ends before document {part.name}", place)


def _not_conll(what: str, place: str) -> DataError:
    return DataError(what, file=place, remedy="is it a *_gold_conll file of CoNLL-2012?")
