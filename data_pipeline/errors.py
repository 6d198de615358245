"""What data errors look like: one line that names file, sample and remedy."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Something is wrong with the data or with how it was asked for; the user can mend it.

    Args:
        what: What is wrong, with the value and the limit.
        file: The file (or ``file:line``) it concerns.
        sample: Number of the sample inside that file.
        remedy: What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        file: Path | str | None = None,
        sample: int | None = None,
        remedy: str | None = None,
    ) -> None:
        parts = [] if file is None else [str(file)]
        if sample is not None:
            parts.append(f"sample {sample}")
        message = ": ".join([*parts, what])
        if remedy is not None:
            message += f"; {remedy}"
        # A file name may hold a newline; the message may not.
        super().__init__(" ".join(message.split()))


class CorruptSampleError(DataError):
    """The bytes of one sample are not the ones that were written; it can be skipped."""
