"""Reads token ranges of documents by seeking; whatever is read has been checked.

The first touch of a document compares its crc32 with the offset table, whose sha256 stands in the
index. Memory is bounded: open files, tables, checked documents and cached tokens are all limited.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haloformer.configs.schema import CacheConfig
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import ShardIndex, ShardInfo, load_index, load_table
from haloformer.data_pipeline.remote import split_address
from haloformer.data_pipeline.store import Store

_REMEDY = "restore it from a copy, prepare the data again, or set data.on_corrupt=skip"
_QUESTIONS = 16  # at a time, to a server
_MAX_TABLES = 256
_MAX_CHECKED = 1 << 12  # documents remembered as sound; a stream reads one at a time
_MAX_CACHED_BYTES = 16 << 20  # tokens of short documents that were just checked
_CHUNK = 1 << 20  # longer documents are checked in chunks and not cached


class ShardReader:
    """Random access to the documents of a data set.

    Args:
        index: From ``load_index``.
        on_corrupt: ``stop`` also checks the size of every shard now; with ``skip`` a damaged
            sample raises ``CorruptSampleError`` when it is touched, for the caller to count.
            Shards of a server are only looked at when they are touched: the launcher has asked
            for their sizes, and each rank would ask again.

    Raises:
        DataError: If a shard is missing or has another size (``stop``).
    """

    def __init__(self, index: ShardIndex, on_corrupt: str = "stop") -> None:
        self.index = index
        self._dtype = np.dtype(index.dtype)
        self._tables: OrderedDict[int, NDArray[np.void]] = OrderedDict()
        self._checked: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.generic]] = OrderedDict()
        self._cached_bytes = 0
        if on_corrupt == "stop" and not index.store.is_remote:
            check_sizes(index)

    def close(self) -> None:
        """Close the open tars."""
        self.index.store.close()

    def lengths(self, shard: int) -> NDArray[np.uint32]:
        """Token counts of a shard's documents, uint32 [num_samples], a view of its table."""
        return self._table(shard)["num_tokens"]

    def pair_lengths(self, shard: int, sample: int) -> tuple[int, int]:
        """Tokens of a pair's source, and of source and target, which follows it."""
        record = self._table(shard)[sample]
        return int(record["num_source"]), int(record["num_tokens"])

    def note(self, shard: int, sample: int) -> dict[str, Any]:
        """What is stored with an example: ``segments`` (tokens of each text), ``note``, ``spans``.

        Raises:
            CorruptSampleError: If it is not what was written.
        """
        record = self._table(shard)[sample]
        offset, size = int(record["note_offset"]), int(record["note_size"])
        crc, name = int(record["note_crc32"]), self.index.shards[shard].name
        content = self._pread(shard, sample, offset, size)
        if zlib.crc32(content) != crc and self.index.store.forget(name, offset, size):
            content = self._pread(shard, sample, offset, size)  # cached wrong, as in ``check``
        if zlib.crc32(content) != crc:
            raise self._corrupt(shard, sample, "the annotation is damaged (wrong crc32)")
        note: dict[str, Any] = json.loads(content)
        return note

    def check(self, shard: int, sample: int) -> None:
        """Make sure that a document's tokens are the ones that were written.

        Raises:
            CorruptSampleError: If the bytes are missing or differ.
        """
        key = (shard, sample)
        if key in self._checked:
            self._checked.move_to_end(key)
            return
        offset, size, crc = self._place(shard, sample)
        content, actual = self._crc32(shard, sample, offset, size)
        name = self.index.shards[shard].name
        if actual != crc and self.index.store.forget(name, offset, size):
            # Cached wrong, it would stay wrong.
            content, actual = self._crc32(shard, sample, offset, size)
        if actual != crc:
            raise self._corrupt(shard, sample, "the tokens are damaged (wrong crc32)")
        self._checked[key] = None
        if len(self._checked) > _MAX_CHECKED:
            self._checked.popitem(last=False)
        if size <= _CHUNK:
            self._keep(key, np.frombuffer(content, self._dtype))

    def read(self, shard: int, sample: int, start: int, stop: int) -> NDArray[np.generic]:
        """Tokens start .. stop-1 of a document, in the stored dtype [stop - start].

        Raises:
            CorruptSampleError: If the document is damaged.
        """
        cached = self._cache.get((shard, sample))  # only what was found sound
        if cached is None:
            self.check(shard, sample)
            cached = self._cache.get((shard, sample))
        if cached is not None:
            return cached[start:stop]
        offset, size, _ = self._place(shard, sample)
        width = self._dtype.itemsize
        assert 0 <= start < stop <= size // width, (shard, sample, start, stop)
        content = self._pread(shard, sample, offset + start * width, (stop - start) * width)
        return np.frombuffer(content, self._dtype)

    def _crc32(self, shard: int, sample: int, offset: int, size: int) -> tuple[bytes, int]:
        """The last chunk of a document, and the checksum of all."""
        content, crc = b"", 0
        for start in range(0, size, _CHUNK):
            content = self._pread(shard, sample, offset + start, min(_CHUNK, size - start))
            crc = zlib.crc32(content, crc)
        return content, crc

    def _place(self, shard: int, sample: int) -> tuple[int, int, int]:
        record = self._table(shard)[sample]
        size = int(record["num_tokens"]) * self._dtype.itemsize
        return int(record["offset"]), size, int(record["crc32"])

    def _keep(self, key: tuple[int, int], tokens: NDArray[np.generic]) -> None:
        if key in self._cache:
            return
        self._cache[key] = tokens
        self._cached_bytes += tokens.nbytes
        while self._cached_bytes > _MAX_CACHED_BYTES:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

    def _pread(self, shard: int, sample: int, offset: int, size: int) -> bytes:
        try:
            content = self.index.store.read_range(self.index.shards[shard].name, offset, size)
        except OSError as fault:
            what = f"cannot be read ({fault.strerror})"
            if fault.errno in (errno.EIO, errno.ENOENT):  # a bad spot of the disk; lost
                raise self._corrupt(shard, sample, what) from fault
            # A limit of open files, a server that forgot a handle: it says nothing of the sample,
            # and is no reason to pass over it.
            path = self.index.store.place(self.index.shards[shard].name)
            remedy = "make it readable, and resume"
            raise DataError(what, file=path, sample=sample, remedy=remedy) from fault
        if len(content) != size:
            raise self._corrupt(shard, sample, "the tar ends before its tokens do")
        return content

    def _corrupt(self, shard: int, sample: int, what: str) -> CorruptSampleError:
        path = self.index.store.place(self.index.shards[shard].name)
        return CorruptSampleError(what, file=path, sample=sample, remedy=_REMEDY)

    def _table(self, shard: int) -> NDArray[np.void]:
        table = self._tables.get(shard)
        if table is None:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.popitem(last=False)
            table = self._tables[shard] = load_table(self.index, shard)
        self._tables.move_to_end(shard)
        return table


def check_sizes(index: ShardIndex) -> None:
    """Check that every shard is there and as long as it was; cheap, nothing is read.

    Raises:
        DataError: Naming the first shard that is not.
    """
    if not index.store.is_remote:
        for shard in index.shards:
            _check_size(index.store, shard)
        return
    with ThreadPoolExecutor(_QUESTIONS) as pool:
        for _ in pool.map(lambda shard: _check_size(index.store, shard), index.shards):
            pass


def _check_size(store: Store, shard: ShardInfo) -> None:
    path = store.place(shard.name)
    try:
        actual = store.size(shard.name)
    except FileNotFoundError as fault:
        raise DataError("the shard is missing", file=path, remedy=_REMEDY) from fault
    if actual != shard.size:
        raise DataError(
            f"the shard has {actual} bytes, the index says {shard.size}", file=path, remedy=_REMEDY
        )


def verify(folder: Path | str, progress: Callable[[int, int], None] | None = None) -> ShardIndex:
    """Check every byte of a data set against the hashes of its index; no cache is believed.

    Args:
        folder: The data set, as for ``load_index``.
        progress: Called with (bytes done, bytes in all) after each shard.

    Returns:
        The index of what was checked.

    Raises:
        DataError: Naming the first file that differs.
    """
    if isinstance(split_address(folder), Path):
        return _verify(load_index(folder), progress)
    with tempfile.TemporaryDirectory() as scratch:
        return _verify(load_index(folder, CacheConfig(path=scratch)), progress)


def _verify(index: ShardIndex, progress: Callable[[int, int], None] | None) -> ShardIndex:
    index.load_tokenizer()
    total, done = sum(shard.size for shard in index.shards), 0
    for number, info in enumerate(index.shards):
        load_table(index, number)
        _check_size(index.store, info)
        digest = hashlib.sha256()
        for chunk in index.store.stream(info.name, info.size):
            digest.update(chunk)
        if digest.hexdigest() != info.sha256:
            path = index.store.place(info.name)
            raise DataError("the shard is damaged (wrong sha256)", file=path, remedy=_REMEDY)
        done += info.size
        if progress is not None:
            progress(done, total)
    return index
