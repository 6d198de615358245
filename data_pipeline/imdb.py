"""IMDB reviews (Maas et al. 2011): a folder per label, a file per review.

aclImdb/train/neg/0_3.txt      review 0 of the negative ones, rated 3 of 10
aclImdb/train/pos/0_9.txt
aclImdb/train/unsup/0_0.txt    no label: passed over
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.records import Found
from haloformer.data_pipeline.source_files import FileRule, InputFile, read_text

_NAME = re.compile(r"([0-9]+)_([0-9]+)\.txt")
_UNLABELLED = "unsup"
# Only from the first of several blanks on: tried from each, a long run would take its square.
_BREAK = re.compile(r"(?:(?<!\s)\s+)?<br\s*/?>\s*")


def _is_review(below: Path) -> bool:
    return (
        len(below.parts) == 2
        and below.parts[0] != _UNLABELLED
        and _NAME.fullmatch(below.name) is not None
    )


def _number_first(path: Path) -> tuple[int, str]:
    # By label they would lie in two blocks, and the first batches of an evaluation be all of one.
    return int(path.name.split("_")[0]), str(path)


FILES = FileRule((".txt",), accepts=_is_review, order=_number_first, example="neg/0_3.txt")


def read_review(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """One review; its line breaks were written as HTML."""
    note = {"id": file.name.removesuffix(".txt"), "label": _label(file)}
    text = _BREAK.sub("\n", read_text(stream, str(file.path)))
    yield Found(Annotated((text,), note), file.name)


def review_labels(files: Sequence[InputFile]) -> tuple[str, ...]:
    """The labels of a folder of reviews: the names of its folders, ascending.

    Raises:
        DataError: If there are not two, or a file was named instead of a folder.
    """
    labels = tuple(sorted({_label(file) for file in files}))
    if len(labels) < 2:
        raise DataError(
            f"holds only the label {labels[0]}",
            file=files[0].path,
            remedy="name the folder of one split, such as aclImdb/train, with neg/ and pos/ in it",
        )
    return labels


def _label(file: InputFile) -> str:
    return Path(file.name).parent.name or "(none)"
