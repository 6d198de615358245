"""Turns text into a data set of tar shards, in bounded memory, all or nothing.

    OUTPUT/train/  OUTPUT/eval/   two data sets, split by document
    OUTPUT/prepare.json           what they were made of: the same request again is answered by it

Everything is written into a hidden folder beside OUTPUT and renamed at the end, so OUTPUT is either
absent, the old one, or complete.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import check_free_disk, fsync_folder, sha256_file, write_atomic
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.sources import (
    Document,
    InputFile,
    SourceFormat,
    content_of,
    find_inputs,
    iter_documents,
)
from haloformer.data_pipeline.tokenizers import ByteTokenizer, Tokenizer, load_bpe, train_bpe

RECORD_NAME = "prepare.json"
DEFAULT_SHARD_TOKENS = 1 << 24
DEFAULT_HOLDOUT = 0.05
_VERSION = 1  # of what prepare makes of the same input; part of the record
_LOCK_NAME = "lock"
# Text grows about so much when a .gz or .bz2 is opened; two bytes are stored per token.
_EXPANSION = 5
_BYTES_PER_TEXT_BYTE = {"byte": 2.2, "bpe": 1.0}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far ``prepare`` has come. A pass is one reading of all the input."""

    phase: str
    bytes_read: int
    bytes_total: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What ``prepare`` made, or found."""

    folder: Path
    train: ShardIndex
    eval: ShardIndex | None
    reused: bool
    seconds: float


def prepare(
    inputs: Sequence[Path],
    *,
    source_format: SourceFormat,
    tokenizer: str,
    output: Path,
    holdout: float = DEFAULT_HOLDOUT,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    keep_markup: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Make ``output/train`` and ``output/eval`` of text.

    Args:
        inputs: Files and folders.
        source_format: See ``iter_documents``; ``pairs`` and ``mediawiki_lead`` make pairs.
        tokenizer: ``byte``, ``train:N``, or a folder with vocab.json and merges.txt.
        output: The folder to make; if it was made by the same request it is used as it is.
        holdout: Share of documents that go to ``eval``, evenly spread; 0 makes no ``eval``.
        shard_tokens: Largest number of tokens per shard (a longer document gets its own).
        keep_markup: Leave wiki markup as it is.
        overwrite: Replace a data set made by another request.
        progress: Called after each document.

    Raises:
        DataError: If an input cannot be read, the disk is too small, there is too little text, or
            ``output`` holds something else.
    """
    began = time.monotonic()
    if not 0.0 <= holdout <= 0.5:
        raise DataError(f"holdout {holdout} is not a share from 0 to 0.5")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens {shard_tokens} is below 1")
    files = find_inputs(inputs, source_format)
    ready = _ready_tokenizer(tokenizer)
    settings: dict[str, Any] = {
        "version": _VERSION,
        "format": source_format,
        "tokenizer": tokenizer if ready is None else f"{ready.kind} {ready.sha256}",
        "holdout": holdout,
        "shard_tokens": shard_tokens,
        "keep_markup": keep_markup,
    }
    found = _find_existing(output, settings, files, overwrite)
    if found is not None:
        return Prepared(output, *found, True, time.monotonic() - began)
    check_free_disk(output, _estimate(files, "bpe" if ready is None else ready.kind))
    job = _Job(files, source_format, keep_markup, holdout, progress)
    with _staging(output) as folder:
        # Another prepare may have finished before we had the lock.
        found = _find_existing(output, settings, files, overwrite)
        if found is not None:
            return Prepared(output, *found, True, time.monotonic() - began)
        _write(folder, job, ready, tokenizer, shard_tokens)
        record = {"settings": settings, "inputs": [_describe(file) for file in files]}
        write_atomic(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
        _publish(folder, output)
    return Prepared(output, *_open(output), False, time.monotonic() - began)


def _ready_tokenizer(spec: str) -> Tokenizer | None:
    """The tokenizer that ``spec`` names, or None when it has to be trained first."""
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("train:"):
        if not spec.removeprefix("train:").isdecimal():
            raise DataError(f"{spec}: give the size of the vocabulary, like train:8192")
        return None
    if not Path(spec).is_dir():
        raise DataError(
            f"tokenizer {spec} is no folder",
            remedy="give `byte`, `train:N`, or a folder with vocab.json and merges.txt",
        )
    return load_bpe(Path(spec))


@dataclass(frozen=True, slots=True)
class _Job:
    """One input, readable as often as needed, with its split into train and eval."""

    files: Sequence[InputFile]
    source_format: SourceFormat
    keep_markup: bool
    holdout: float
    progress: Callable[[Progress], None] | None

    def documents(self) -> Iterator[tuple[Document, bool]]:
        """Every document, and whether it is held out."""
        documents = iter_documents(self.files, self.source_format, keep_markup=self.keep_markup)
        for number, document in enumerate(documents):
            # Held out where the rounded quota steps up: an exact share, evenly spread.
            quota = [int((number + n) * self.holdout + 0.5) for n in (0, 1)]
            yield document, quota[1] > quota[0]

    def training_texts(self) -> Iterator[str]:
        """Texts of the training part, for a tokenizer that has to be trained."""
        for number, (document, held_out) in enumerate(self.documents(), 1):
            self.report("reading", document, number, 0)
            if not held_out:
                yield document.text
                if document.target is not None:
                    yield document.target

    def report(self, phase: str, document: Document, num_documents: int, num_tokens: int) -> None:
        if self.progress is not None:
            total = sum(file.size for file in self.files)
            self.progress(Progress(phase, document.bytes_read, total, num_documents, num_tokens))


def _write(
    folder: Path, job: _Job, tokenizer: Tokenizer | None, spec: str, shard_tokens: int
) -> None:
    if tokenizer is None:
        tokenizer = train_bpe(job.training_texts(), int(spec.removeprefix("train:")))
    with ExitStack() as stack:
        writers = {}
        for name in ("train", "eval"):
            (folder / name).mkdir()
            content = content_of(job.source_format)
            writer = DatasetWriter(folder / name, tokenizer, shard_tokens, content)
            writers[name] = stack.enter_context(writer)
        train, held = writers["train"], writers["eval"]
        for document, held_out in job.documents():
            writer = held if held_out else train
            _write_document(writer, document, tokenizer)
            num_documents = train.num_samples + held.num_samples
            job.report("writing", document, num_documents, train.num_tokens + held.num_tokens)
        num_documents = train.num_samples + held.num_samples
        if not train.num_samples:
            raise DataError(
                f"the input holds {num_documents} documents with text, none of them for training",
                file=job.files[0].path,
                remedy="check --input and --format",
            )
        if job.holdout and not held.num_samples:
            raise DataError(
                f"a holdout of {job.holdout} of {num_documents} documents is no document",
                file=job.files[0].path,
                remedy="give --holdout 0 (no eval part) or a larger share",
            )
        train.close()
        if held.num_samples:
            held.close()
        else:
            (folder / "eval").rmdir()


def _write_document(writer: DatasetWriter, document: Document, tokenizer: Tokenizer) -> None:
    text, target = document.text, document.target
    if target is None:
        writer.add(text, tokenizer.encode(text), document.origin)
    else:
        tokens = tokenizer.encode(text), tokenizer.encode(target)
        writer.add_pair((text, target), *tokens, document.origin)


def _estimate(files: Sequence[InputFile], kind: str) -> int:
    text = sum(f.size * (_EXPANSION if f.path.suffix in (".gz", ".bz2") else 1) for f in files)
    return int(text * _BYTES_PER_TEXT_BYTE[kind])


def _describe(file: InputFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "size": file.size,
        "mtime_ns": file.path.stat().st_mtime_ns,
        "sha256": sha256_file(file.path),
    }


def _find_existing(
    output: Path, settings: dict[str, Any], files: Sequence[InputFile], overwrite: bool
) -> tuple[ShardIndex, ShardIndex | None] | None:
    """What the same request made before; None if there is nothing or it shall be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
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
    if not _same_inputs(old_inputs, files):
        differing.append("input")
    if not differing:
        return _open(output)
    if overwrite:
        return None
    changes = ", ".join(
        key if key == "input" else f"{key} {old_settings.get(key)} -> {settings[key]}"
        for key in differing
    )
    raise DataError(
        f"holds a data set of another request ({changes})",
        file=output,
        remedy="give --overwrite or another --output",
    )


def _same_inputs(old: list[dict[str, Any]], files: Sequence[InputFile]) -> bool:
    if [entry.get("name") for entry in old] != [file.name for file in files]:
        return False
    # An untouched file need not be read again, one with a new date is compared by content.
    return all(
        entry["size"] == file.size
        and (
            entry["mtime_ns"] == file.path.stat().st_mtime_ns
            or entry["sha256"] == sha256_file(file.path)
        )
        for entry, file in zip(old, files, strict=True)
    )


def _open(output: Path) -> tuple[ShardIndex, ShardIndex | None]:
    held = output / "eval"
    return load_index(output / "train"), load_index(held) if held.exists() else None


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that this process alone writes."""
    folder = output.absolute().parent / f".{output.absolute().name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_NAME).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(folder)  # what a killed prepare has left
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # gone already if all went well
    except BlockingIOError as fault:
        raise DataError(
            "another prepare is writing this output", file=output, remedy="wait for it"
        ) from fault
    except OSError as fault:
        raise DataError(
            f"cannot go on: {fault.filename or 'writing'}: {fault.strerror}",
            file=output,
            remedy="check free disk and permissions",
        ) from fault


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK_NAME:
            entry.unlink()


def _publish(folder: Path, output: Path) -> None:
    target = output.absolute()
    fsync_folder(folder)
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if target.exists() and any(target.iterdir()):
        target.rename(old)
    folder.rename(target)
    # Last: while it lies in the hidden folder nobody else may write there.
    (target / _LOCK_NAME).unlink()
    fsync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)
