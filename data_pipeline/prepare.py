"""Turns text into a data set of tar shards, in bounded memory, all or nothing.

    OUTPUT/train/  OUTPUT/eval/   two data sets, split by document
    OUTPUT/test/                  of enwik8 and text8 a third, all split by bytes
    OUTPUT/prepare.json           what they were made of: the same request again is answered by it

Everything is written into a hidden folder beside OUTPUT and renamed at the end, so OUTPUT is either
absent, the old one, or complete.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from haloformer.data_pipeline.annotated import Annotated, token_spans
from haloformer.data_pipeline.byte_parts import Part
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import check_free_disk, fsync_folder, write_atomic
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.records import LeftOut, Pair
from haloformer.data_pipeline.request import RECORD_NAME, Inputs, is_made
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.source_files import COMPRESSED, InputFile
from haloformer.data_pipeline.sources import (
    Document,
    SourceFormat,
    content_of,
    find_inputs,
    is_bytes,
    iter_documents,
    labels_of,
)
from haloformer.data_pipeline.tokenizers import ByteTokenizer, Tokenizer, load_bpe, train_bpe

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

    phase: str  # what this pass is for
    bytes_read: int  # in this pass
    bytes_total: int  # of all input files
    num_documents: int  # so far
    num_tokens: int  # so far


@dataclass(frozen=True, slots=True)
class Prepared:
    """What ``prepare`` made, or found."""

    folder: Path  # holds train, eval and test
    train: ShardIndex  # to learn from
    eval: ShardIndex | None  # held out, None without a holdout
    reused: bool  # made by the same request before
    seconds: float  # that it took
    test: ShardIndex | None = None  # held out of enwik8 and text8 for the end
    left_out: dict[str, int] = field(default_factory=dict)  # records that are no sample, by why


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
        source_format: See ``iter_documents``.
        tokenizer: ``byte``, ``train:N``, or a folder with vocab.json and merges.txt.
        output: The folder to make; if it was made by the same request it is used as it is.
        holdout: Share of documents that go to ``eval``, evenly spread; 0 makes no ``eval``. Of
            ``enwik8`` and ``text8`` the share of bytes for ``eval``, and again for ``test``.
        shard_tokens: Largest number of tokens per shard (a longer document gets its own).
        keep_markup: Leave wiki markup as it is.
        overwrite: Replace a data set made by another request.
        progress: Called after each document.

    Returns:
        The indexes of what was made, or of what the same request made before.

    Raises:
        DataError: If an input cannot be read, the disk is too small, there is too little text, or
            ``output`` holds something else.
    """
    began = time.monotonic()
    if not 0.0 <= holdout <= 0.5:
        raise DataError(
            f"holdout {holdout} is not a share from 0 to 0.5",
            remedy="give --holdout 0.05 for a twentieth, 0 for none",
        )
    if shard_tokens < 1:
        raise DataError(
            f"shard_tokens {shard_tokens} is below 1",
            remedy=f"leave --shard-tokens out; {DEFAULT_SHARD_TOKENS} is the default",
        )
    files = find_inputs(inputs, source_format)
    labels = labels_of(files, source_format)
    ready = _ready_tokenizer(tokenizer)
    if is_bytes(source_format) and (ready is None or ready.kind != "byte"):
        raise DataError(f"{source_format} is bytes, not text", remedy="give --tokenizer byte")
    settings: dict[str, Any] = {
        "version": _VERSION,
        "format": source_format,
        "tokenizer": tokenizer if ready is None else f"{ready.kind} {ready.sha256}",
        "holdout": holdout,
        "shard_tokens": shard_tokens,
        "keep_markup": keep_markup,
    }
    inputs_now = Inputs(files, source_format)
    if is_made(output, settings, inputs_now, overwrite):
        return _open(output, True, began)
    check_free_disk(output, _estimate(files, "bpe" if ready is None else ready.kind))
    job = _Job(files, source_format, keep_markup, holdout, progress, labels)
    with _staging(output) as folder:
        # Another prepare may have finished before we had the lock.
        if is_made(output, settings, inputs_now, overwrite):
            return _open(output, True, began)
        _write(folder, job, ready, tokenizer, shard_tokens)
        record = {
            "settings": settings,
            "inputs": inputs_now.describe(),
            "left_out": dict(job.left_out),
        }
        write_atomic(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
        _publish(folder, output)
    return _open(output, False, began)


def _ready_tokenizer(spec: str) -> Tokenizer | None:
    """The tokenizer that ``spec`` names, or None when it has to be trained first."""
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("train:"):
        if not spec.removeprefix("train:").isdecimal():
            raise DataError(
                f"tokenizer {spec} names no size",
                remedy="give the size of the vocabulary, like train:8192",
            )
        return None
    if not Path(spec).is_dir():
        raise DataError(
            f"tokenizer {spec} is no folder",
            remedy="give `byte`, `train:N`, or a folder with vocab.json and merges.txt",
        )
    return load_bpe(Path(spec))


@dataclass(frozen=True, slots=True)
class _Job:
    """One input, readable as often as needed, with its split into data sets."""

    files: Sequence[InputFile]
    source_format: SourceFormat
    keep_markup: bool
    holdout: float
    progress: Callable[[Progress], None] | None
    labels: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)  # of the last reading

    def documents(self) -> Iterator[tuple[Document, Part]]:
        """Every document, and the data set it is for."""
        self.left_out.clear()
        number = 0
        for document in iter_documents(
            self.files, self.source_format, keep_markup=self.keep_markup, holdout=self.holdout
        ):
            if isinstance(document.body, LeftOut):
                self.left_out[document.body.why] += 1
                continue
            # Held out where the rounded quota steps up: an exact share, evenly spread.
            quota = [int((number + n) * self.holdout + 0.5) for n in (0, 1)]
            number += 1
            yield document, document.part or ("eval" if quota[1] > quota[0] else "train")

    def training_texts(self) -> Iterator[str]:
        """Texts of the training part, for a tokenizer that has to be trained."""
        for number, (document, part) in enumerate(self.documents(), 1):
            self.report("reading", document, number, 0)
            if part == "train":
                yield from document.texts

    def report(self, phase: str, document: Document, num_documents: int, num_tokens: int) -> None:
        if self.progress is not None:
            total = sum(file.size for file in self.files)
            self.progress(Progress(phase, document.bytes_read, total, num_documents, num_tokens))


def _write(
    folder: Path, job: _Job, tokenizer: Tokenizer | None, spec: str, shard_tokens: int
) -> None:
    if tokenizer is None:
        tokenizer = train_bpe(job.training_texts(), int(spec.removeprefix("train:")))
    content = content_of(job.source_format)
    with ExitStack() as stack:
        writers: dict[Part, DatasetWriter] = {}
        for part in get_args(Part):
            (folder / part).mkdir()
            writer = DatasetWriter(folder / part, tokenizer, shard_tokens, content, job.labels)
            writers[part] = stack.enter_context(writer)
        num_documents = num_tokens = 0
        for document, part in job.documents():
            writer = writers[part]
            before = writer.num_tokens
            _write_document(writer, document, tokenizer)
            num_documents, num_tokens = num_documents + 1, num_tokens + writer.num_tokens - before
            job.report("writing", document, num_documents, num_tokens)
        _check_parts(writers, job, num_documents)
        for part, writer in writers.items():
            if writer.num_samples:
                writer.close()
            else:
                (folder / part).rmdir()


def _check_parts(writers: dict[Part, DatasetWriter], job: _Job, num_documents: int) -> None:
    if not writers["train"].num_samples:
        reasons = "".join(f", {count} left out: {why}" for why, count in job.left_out.items())
        raise DataError(
            f"the input holds {num_documents} documents with text, none of them for training"
            f"{reasons}",
            file=job.files[0].path,
            remedy="check --input and --format",
        )
    if job.holdout and not writers["eval"].num_samples:
        raise DataError(
            f"a holdout of {job.holdout} of {num_documents} documents is no document",
            file=job.files[0].path,
            remedy="give --holdout 0 (no eval part) or a larger share",
        )


def _write_document(writer: DatasetWriter, document: Document, tokenizer: Tokenizer) -> None:
    match document.body:
        case str(text):
            writer.add(text, tokenizer.encode(text), document.origin)
        case bytes(content):
            assert isinstance(tokenizer, ByteTokenizer), "checked with the request"
            writer.add_bytes(content, tokenizer.encode_bytes(content), document.origin)
        case Pair(source, target) as pair:
            tokens = tokenizer.encode(source), tokenizer.encode(target)
            writer.add_pair(pair, *tokens, document.origin)
        case Annotated() as example:
            segments = [tokenizer.encode(text) for text in example.segments]
            spans = token_spans(example.segments[-1], segments[-1], tokenizer, example.spans)
            writer.add_example(example, segments, spans, document.origin)


def _estimate(files: Sequence[InputFile], kind: str) -> int:
    text = sum(f.size * (_EXPANSION if f.path.suffix.lower() in COMPRESSED else 1) for f in files)
    return int(text * _BYTES_PER_TEXT_BYTE[kind])


def _open(output: Path, reused: bool, began: float) -> Prepared:
    parts = {
        part: load_index(output / part) if (output / part).exists() else None
        for part in get_args(Part)
    }
    assert parts["train"] is not None, "nothing is published without it"
    left_out = json.loads((output / RECORD_NAME).read_bytes()).get("left_out", {})
    return Prepared(
        folder=output,
        train=parts["train"],
        eval=parts["eval"],
        test=parts["test"],
        reused=reused,
        seconds=time.monotonic() - began,
        left_out=left_out,
    )


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
