"""enwik8 and text8 (Mahoney): one large file of raw bytes, cut where the field cuts it.

    bytes    0                                90 000 000      95 000 000     100 000 000
             [ train                          )[ eval         )[ test         )
    parts    [ 16 MiB )[ 16 MiB ) .. [ rest   )[ one part     )[ one part     )

Nothing is decoded: enwik8 is not valid UTF-8 at its end. A part is a document, so that memory is
bounded; a training sequence that spans two parts has one </s> between them, six in enwik8, and
those of eval and test have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.source_files import COMPRESSED, InputFile

Part = Literal["train", "eval", "test"]
PART_BYTES = 1 << 24
TEXT8 = b"abcdefghijklmnopqrstuvwxyz "  # all that text8 holds


class BytePart(NamedTuple):
    """Consecutive bytes, which data set they are for, and where they are in the file."""

    content: bytes
    part: Part
    start: int


def iter_byte_parts(
    files: Sequence[InputFile], holdout: float, allowed: bytes | None = None
) -> Iterator[BytePart]:
    """Cut a file into training, validation and test bytes, and those into parts.

    Args:
        files: The one file.
        holdout: Share of the bytes for validation, and the same again for test, at the end of the
            file: 0.05 is the usual 90 : 5 : 5.
        allowed: The bytes that may be in it; None: any.

    Raises:
        DataError: If there are several files, it is compressed, it changes meanwhile, or it holds
            another byte.
    """
    if len(files) != 1 or files[0].path.suffix.lower() in COMPRESSED:
        raise DataError(
            "bytes are read from one file, not compressed",
            file=files[0].path,
            remedy="unpack it, and name the file alone",
        )
    file = files[0]
    held = round(file.size * holdout)
    ends: list[tuple[Part, int]] = [
        ("train", file.size - 2 * held),
        ("eval", file.size - held),
        ("test", file.size),
    ]
    start = 0
    with file.path.open("rb") as stream:
        for part, end in ends:
            while start < end:
                content = stream.read(min(PART_BYTES, end - start))
                if not content:
                    raise DataError(
                        "it became shorter while it was read", file=file.path, remedy="start again"
                    )
                others = content.translate(None, allowed) if allowed else b""
                if others:
                    raise DataError(
                        f"byte {start + content.index(others[0])} is {others[:1]!r}, not one of "
                        f"{allowed!r}",
                        file=file.path,
                        remedy="give --format enwik8, which takes any bytes",
                    )
                yield BytePart(content, part, start)
                start += len(content)
