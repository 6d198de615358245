"""The writer of a data set: WebDataset tar shards of whole tokenised documents.

webdataset's own ShardWriter makes the tars, so any webdataset reader opens them; beside it we note
where each sample's tokens lie, for reading by seek:

    tar:  [head json][json..pad][head npy][npy header | TOKENS ..pad][head json] ...
                                                       ^ offset in the table

The bytes depend on the documents alone: no clock, no user name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import fsync_folder, write_atomic
from haloformer.data_pipeline.index import (
    MAX_NOTE_BYTES,
    TOKENIZER_FOLDER,
    Content,
    ShardIndex,
    ShardInfo,
    record_of,
    save_index,
)
from haloformer.data_pipeline.tokenizers import Tokenizer

if TYPE_CHECKING:
    from webdataset.writer import ShardWriter

_BLOCK = 512
_UNLIMITED = 1 << 62


class _HashingFile:
    """A file under a temporary name that hashes what goes through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.size = 0
        self._stream: IO[bytes] = path.with_name(path.name + ".tmp").open("wb")

    def write(self, content: bytes) -> int:
        if self._stream.closed:
            return len(content)  # abandoned: the tar's last blocks go nowhere
        self.digest.update(content)
        self.size += len(content)
        return self._stream.write(content)

    def finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        Path(self._stream.name).rename(self.path)

    def abandon(self) -> None:
        self._stream.close()


class DatasetWriter:
    """Writes one data set into an empty folder; ``close`` makes it complete.

    Args:
        folder: An existing, empty folder.
        tokenizer: What made the tokens; it is saved beside them.
        shard_tokens: A shard is closed before it would pass this many tokens.
        content: What is written: by ``add`` and ``add_bytes`` documents, by ``add_pair`` pairs, by
            ``add_example`` the others.
        labels: The classes of ``classification``, in the order of their numbers.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        shard_tokens: int,
        content: Content = "documents",
        labels: tuple[str, ...] = (),
    ) -> None:
        self._folder, self._labels = folder, labels
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._content: Content = content
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
        self._shards: list[ShardInfo] = []
        self._records: list[tuple[int, ...]] = []
        self._held = 0  # tokens and characters of the open shard
        self._num_characters = 0
        self.num_samples = 0
        self.num_tokens = 0
        self._file: _HashingFile | None = None
        self._writer: ShardWriter | None = None

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # Left by an exception: what lies in the folder is not a data set, nothing is finished.
        if self._file is not None and self._writer is not None:
            self._file.abandon()
            self._writer.tarstream.close()

    def add(self, text: str, tokens: NDArray[np.int64], origin: str) -> None:
        """Append one document.

        Args:
            text: The source text.
            tokens: Its ids, int64 [n], n > 0.
            origin: Where it comes from; kept in the sample's JSON.
        """
        assert self._content == "documents"
        self._add(_size(text), tokens, origin)

    def add_bytes(self, content: bytes, tokens: NDArray[np.int64], origin: str) -> None:
        """Append one document that is bytes, not text; a byte counts as a character.

        Args:
            content: The bytes.
            tokens: Their ids, int64 [n], n > 0.
            origin: Where they come from.
        """
        assert self._content == "documents"
        self._add(_Size(len(content), len(content)), tokens, origin)

    def add_pair(
        self,
        texts: tuple[str, str],
        source: NDArray[np.int64],
        target: NDArray[np.int64],
        origin: str,
    ) -> None:
        """Append one pair.

        Args:
            texts: Source and target.
            source: Ids of the source, int64 [n], n > 0.
            target: Ids of the target, int64 [m], m > 0.
            origin: Where it comes from; kept in the sample's JSON.
        """
        assert self._content == "pairs" and len(source) and len(target)
        tokens = np.concatenate([source, target])
        num_source = {"num_source": len(source)}
        self._add(_size(*texts), tokens, origin, num_source, (len(source),))

    def add_example(
        self,
        example: Annotated,
        segments: Sequence[NDArray[np.int64]],
        spans: list[list[int]],
        origin: str,
    ) -> None:
        """Append one annotated example.

        Args:
            example: Its texts and its note.
            segments: Ids of each text, int64 [n_i], the last of them not empty.
            spans: From ``token_spans``.
            origin: Where it comes from.

        Raises:
            DataError: If the annotation is too long.
        """
        assert self._content not in ("documents", "pairs") and len(segments[-1])
        assert self._content != "classification" or example.note["label"] in self._labels
        lengths = [len(segment) for segment in segments]
        facts = {"segments": lengths, "note": example.note, "spans": spans}
        self._add(_size(*example.segments), np.concatenate(segments), origin, facts, None)

    def _add(
        self,
        size: _Size,
        tokens: NDArray[np.int64],
        origin: str,
        facts: Mapping[str, object] = MappingProxyType({}),
        extra: tuple[int, ...] | None = (),
    ) -> None:
        """Append a sample; ``extra`` ends its record, None stands for the place of its JSON."""
        assert len(tokens), "an empty document has no place in a shard"
        if self._writer is None:
            self._writer = self._open()
        elif self._held and self._held + len(tokens) > self._shard_tokens:
            self._writer.next_stream()
        stored = np.ascontiguousarray(tokens, self._dtype)
        meta = {**size._asdict(), "num_tokens": len(tokens), "source": origin, **facts}
        json_bytes, npy_bytes = json.dumps(meta).encode(), _npy(stored)
        if extra is None and len(json_bytes) > MAX_NOTE_BYTES:
            raise DataError(
                f"the annotation has {len(json_bytes)} bytes, the limit is {MAX_NOTE_BYTES}",
                file=origin,
                remedy="leave this record out",
            )
        archive = self._writer.tarstream.tarstream
        start = archive.offset
        key = f"{self.num_samples:012d}"
        self._writer.write({"__key__": key, "json": json_bytes, "npy": npy_bytes})
        npy_start = start + 2 * _BLOCK + _padded(len(json_bytes))
        assert archive.offset == npy_start + _padded(len(npy_bytes)), (
            "webdataset changed its layout"
        )
        offset = npy_start + len(npy_bytes) - stored.nbytes
        if extra is None:
            extra = (start + _BLOCK, len(json_bytes), zlib.crc32(json_bytes))
        record = (offset, len(tokens), size.num_bytes, zlib.crc32(stored.data))
        self._records.append((*record, *extra))
        self._held += len(tokens)
        self._num_characters += size.num_characters
        self.num_samples += 1
        self.num_tokens += len(tokens)

    def close(self) -> ShardIndex:
        """Finish the last shard, save the tokenizer, write the index last."""
        assert self._writer is not None, "a data set without a document"
        self._writer.close()
        folder = self._folder / TOKENIZER_FOLDER
        folder.mkdir()
        self._tokenizer.save(folder)
        fsync_folder(self._folder)
        return save_index(
            self._folder,
            self._shards,
            self._dtype.str,
            self._tokenizer,
            self._content,
            self._labels,
        )

    def _open(self) -> ShardWriter:
        # webdataset imports torch: two seconds that only writing is worth.
        from webdataset.writer import ShardWriter

        return ShardWriter(
            str(self._folder).replace("%", "%%") + "/shard-%06d.tar",
            maxcount=_UNLIMITED,
            maxsize=_UNLIMITED,
            post=self._finish_shard,
            opener=self._open_shard,
            verbose=0,
            encoder=False,
            mtime=0,
            user="",
            group="",
        )

    def _open_shard(self, name: str) -> _HashingFile:
        self._file = _HashingFile(Path(name))
        return self._file

    def _finish_shard(self, name: str) -> None:
        file = self._file
        assert file is not None and file.path == Path(name)
        file.finish()
        self._file = None
        table = np.array(self._records, record_of(self._content))
        info = ShardInfo(
            name=file.path.name,
            size=file.size,
            sha256=file.digest.hexdigest(),
            table_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
            num_samples=len(table),
            num_tokens=int(table["num_tokens"].sum(dtype=np.int64)),
            num_bytes=int(table["num_bytes"].sum(dtype=np.int64)),
            num_characters=self._num_characters,
        )
        write_atomic(self._folder / info.table_name, table.tobytes())
        self._shards.append(info)
        self._records, self._held, self._num_characters = [], 0, 0


class _Size(NamedTuple):
    """Of a sample's texts."""

    num_bytes: int
    num_characters: int


def _size(*texts: str) -> _Size:
    return _Size(sum(len(text.encode("utf-8")) for text in texts), sum(map(len, texts)))


def _npy(tokens: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, tokens, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _padded(size: int) -> int:
    """Size of a tar member's data with its padding."""
    return -(-size // _BLOCK) * _BLOCK
