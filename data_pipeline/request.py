"""The record of what ``prepare`` made: the same request again is answered by it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import sha256_file
from haloformer.data_pipeline.source_files import InputFile
from haloformer.data_pipeline.sources import SourceFormat, file_beside

RECORD_NAME = "prepare.json"


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a request, to be written down and recognised."""

    files: Sequence[InputFile]
    source_format: SourceFormat

    def describe(self) -> list[dict[str, Any]]:
        """Name, size, date and hash of each."""
        return [
            {"name": name, "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
            | {"sha256": sha256_file(path)}
            for name, path in self._paths()
        ]

    def are(self, old: list[dict[str, Any]]) -> bool:
        """Whether they are the files that were described."""
        paths = list(self._paths())
        if [entry.get("name") for entry in old] != [name for name, _ in paths]:
            return False
        # An untouched file need not be read again, one with a new date is compared by content.
        return all(
            entry["size"] == path.stat().st_size
            and (
                entry["mtime_ns"] == path.stat().st_mtime_ns or entry["sha256"] == sha256_file(path)
            )
            for entry, (_, path) in zip(old, paths, strict=True)
        )

    def _paths(self) -> Iterator[tuple[str, Path]]:
        for file in self.files:
            yield file.name, file.path
            beside = file_beside(file, self.source_format)
            if beside is not None:
                yield beside.name, beside


def is_made(output: Path, settings: dict[str, Any], inputs: Inputs, overwrite: bool) -> bool:
    """Whether the same request made it before; not if there is nothing or it shall be replaced.

    Args:
        output: The folder.
        settings: Of this request.
        inputs: Of this request.
        overwrite: Whether what another request made may be replaced.

    Raises:
        DataError: If it holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        record = json.loads((output / RECORD_NAME).read_bytes())
        old_settings, old_inputs = dict(record["settings"]), list(record["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise DataError(
            "it exists and was not made by prepare",
            file=output,
            remedy="choose another --output; it is never overwritten",
        ) from fault
    differing = [key for key, value in settings.items() if old_settings.get(key) != value]
    if not inputs.are(old_inputs):
        differing.append("input")
    if not differing or overwrite:
        return not differing
    changes = ", ".join(
        key if key == "input" else f"{key} {old_settings.get(key)} -> {settings[key]}"
        for key in differing
    )
    raise DataError(
        f"holds a data set of another request ({changes})",
        file=output,
        remedy="give --overwrite or another --output",
    )
