"""The manifest of a checkpoint. It is written last: without a valid one there is no checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from haloformer.configs.load import parse_config
from haloformer.configs.schema import TrainConfig

FORMAT: Final = 1

# One folder per attempt to write, then a plain file name: nothing here can point elsewhere.
_FILE_NAME = r"^data-[0-9a-f]{16}/[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$"
_READ_AT_ONCE = 1 << 20


class ManifestError(ValueError):
    """The text is not a whole manifest of a known format."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Record):
    """One file of a checkpoint; ``name`` is relative to the folder of the step."""

    name: Annotated[str, Field(pattern=_FILE_NAME)]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LayoutRecord(_Record):
    """How the run was spread when it wrote this; for people, loading does not need it."""

    data: int
    context: int
    tensor: int
    zero_stage: int
    precision: str


class Manifest(_Record):
    """What a checkpoint is.

    Attributes:
        step: Optimizer steps taken.
        config: The recipe, as JSON.
        config_hash: Of the recipe, see ``configs.load.config_hash``.
        layout: Mesh that wrote it.
        state: Whatever the trainer needs besides weights and moments.
        files: Everything else in the checkpoint, at least one file.
    """

    format: Literal[1]
    step: Annotated[int, Field(ge=0)]
    config: dict[str, Any]
    config_hash: str
    layout: LayoutRecord
    state: dict[str, Any]
    files: Annotated[list[FileEntry], Field(min_length=1)]

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)

    @property
    def folder(self) -> str:
        """The folder all files are in, relative to the folder of the step."""
        return self.files[0].name.partition("/")[0]

    def train_config(self) -> TrainConfig:
        """The recipe, validated.

        Raises:
            ConfigError: If it has what this version does not know.
        """
        return parse_config(self.config, f"checkpoint step {self.step}")

    def to_text(self) -> str:
        """JSON with a hash over itself, so that a cut or altered manifest shows."""
        # Hash what a reader will parse: JSON turns every key into a string, and sorts them as such.
        body = json.loads(json.dumps(self.model_dump(mode="json"), allow_nan=False))
        return json.dumps({**body, "sha256": _hash_of(body)}, indent=1)

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Parse what ``to_text`` wrote.

        Raises:
            ManifestError: Saying what is wrong with it.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"cut short or not JSON ({error})") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise ManifestError(f"format {found!r}; this version reads format {FORMAT}")
        if body.pop("sha256", None) != _hash_of(body):
            raise ManifestError("its own sha256 differs: it was changed after it was written")
        try:
            manifest = cls.model_validate(body)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise ManifestError(f"{where}: {fault['msg']}") from error
        if any(not file.name.startswith(f"{manifest.folder}/") for file in manifest.files):
            raise ManifestError("its files are in more than one folder")
        return manifest


def describe_file(path: Path, name: str) -> FileEntry:
    """Size and hash of a file as it is on the disk now."""
    return FileEntry(name=name, size=path.stat().st_size, sha256=hash_file(path))


def fault_of_file(entry: FileEntry, path: Path) -> str | None:
    """Why a file is not the one that was written, None if it is."""
    if not path.is_file():
        return f"{entry.name} is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{entry.name} has {size} bytes instead of {entry.size}"
    try:
        sha256 = hash_file(path)
    except OSError as error:
        if error.errno != errno.EIO:  # a bad spot of the disk; anything else may pass
            raise
        return f"{entry.name} cannot be read ({error.strerror})"
    if sha256 != entry.sha256:
        return f"{entry.name} has changed (its sha256 is not the one in the manifest)"
    return None


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _hash_of(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
