"""The index of a data set: ``index.json`` and one binary offset table per shard.

    train/
      index.json            written last: a folder without it is not a data set
      shard-000000.tar      WebDataset: 000000000000.json, 000000000000.npy, 000000000001.json ...
                            (of a pair the .npy holds source and target, one after the other; of
                            an example all its texts, and the .json what is to be learned)
      shard-000000.offsets  one record per sample: where its tokens lie in the tar
      tokenizer/            what made the tokens

index.json holds a hash of itself and of every other file; the table holds a crc32 per sample. So
whatever is read can be checked, down to one document.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from haloformer.configs.schema import CacheConfig
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import write_atomic
from haloformer.data_pipeline.store import Store, open_store
from haloformer.data_pipeline.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer

FORMAT = "haloformer-shards"
VERSION = 1
INDEX_NAME = "index.json"
TOKENIZER_FOLDER = "tokenizer"
RECORD = np.dtype(
    [("offset", "<u8"), ("num_tokens", "<u4"), ("num_bytes", "<u4"), ("crc32", "<u4")]
)
# A pair's tokens are those of its source and then those of its target.
PAIR_RECORD = np.dtype([*RECORD.descr, ("num_source", "<u4")])
# An example's tokens are those of its texts, one after the other; its note is the sample's JSON.
EXAMPLE_RECORD = np.dtype(
    [*RECORD.descr, ("note_offset", "<u8"), ("note_size", "<u4"), ("note_crc32", "<u4")]
)
MAX_NOTE_BYTES = 1 << 20  # of one example
Content = Literal["documents", "pairs", "classification", "questions", "choices", "coreference"]
_RECORDS: dict[Content, np.dtype[np.void]] = {"documents": RECORD, "pairs": PAIR_RECORD}
_FORMATS: dict[Content, str] = {
    "documents": "text, jsonl, mediawiki, enwik8 or text8",
    "pairs": "pairs, mediawiki_lead or arxiv",
    "classification": "imdb or hyperpartisan",
    "questions": "triviaqa or hotpotqa",
    "choices": "wikihop",
    "coreference": "conll2012",
}
_SHARD_NAME = re.compile(r"shard-[0-9]{6,9}\.tar")
_HASH = re.compile(r"[0-9a-f]{64}")
_DTYPES = ("<u2", "<i4")
_REMEDY = "restore it from a copy or prepare the data again"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar file."""

    name: str  # file name
    size: int  # bytes
    sha256: str  # of the tar file
    table_sha256: str  # of its offset table
    num_samples: int  # documents, pairs or examples
    num_tokens: int  # of all of them
    num_bytes: int  # of the source text, UTF-8
    num_characters: int  # of the source text

    @property
    def table_name(self) -> str:
        """File name of its offset table."""
        return self.name.removesuffix(".tar") + ".offsets"


@dataclass(frozen=True)
class ShardIndex:
    """All that is known about a data set without opening a shard."""

    folder: Path | str  # a path, or the address of a remote data set
    shards: tuple[ShardInfo, ...]  # in the order in which they were written
    dtype: str  # numpy name of the stored tokens
    tokenizer_kind: str  # byte or bpe
    tokenizer_sha256: str  # two data sets of one tokenizer have the same
    vocab_size: int  # tokens, the special ones included
    sha256: str  # names the content: two data sets with the same hash are the same
    store: Store = field(compare=False, repr=False)  # how its files are read
    content: Content = "documents"  # what a sample is
    labels: tuple[str, ...] = ()  # of classification: the classes, in the order of their numbers

    @property
    def num_samples(self) -> int:
        """Documents, pairs or examples."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the source text (UTF-8)."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte = nats per token / ln 2 / bytes_per_token."""
        return self.num_bytes / self.num_tokens

    @property
    def characters_per_token(self) -> float:
        """Bits per character = nats per token / ln 2 / characters_per_token."""
        return sum(shard.num_characters for shard in self.shards) / self.num_tokens

    @property
    def record(self) -> np.dtype[np.void]:
        """One entry of an offset table."""
        return record_of(self.content)

    def check_content(self, wanted: Content) -> None:
        """Refuse a data set of the other kind.

        Raises:
            DataError: If it holds something else.
        """
        if self.content != wanted:
            raise DataError(
                f"it holds {self.content}, and this model is trained on {wanted}",
                file=self.folder,
                remedy=f"prepare the data with --format {_FORMATS[wanted]}",
            )

    def check_labels(self, labels: tuple[str, ...], origin: Path | str) -> None:
        """Refuse a data set of other classes than those a model is trained on.

        Args:
            labels: The classes of the training data.
            origin: Where those come from, for the message.

        Raises:
            DataError: If this data set has others, or the same in another order.
        """
        if labels != self.labels:
            raise DataError(
                f"it has the labels {', '.join(self.labels)}, and {origin} has {', '.join(labels)}",
                file=self.folder,
                remedy="prepare both from folders with the same labels",
            )

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made these tokens.

        Raises:
            DataError: If the folder holds another one.
        """
        origin = self.store.place(TOKENIZER_FOLDER)
        with self.store.local_folder(TOKENIZER_FOLDER, TOKENIZER_FILES) as folder:
            try:
                tokenizer = load_tokenizer(folder)
            except DataError as fault:
                if not self.store.is_remote:
                    raise
                # The copy is gone when the message is read.
                told = str(fault).replace(str(folder), str(origin))
                raise DataError(told) from fault
        self.check_tokenizer(tokenizer.sha256, origin)
        return tokenizer

    def check_tokenizer(self, sha256: str, origin: Path | str) -> None:
        """Refuse a tokenizer that did not make these tokens.

        Args:
            sha256: Its hash.
            origin: Where it comes from, for the message.

        Raises:
            DataError: If it is another one.
        """
        if sha256 != self.tokenizer_sha256:
            raise DataError(
                f"tokenizer {sha256[:12]} did not make the tokens of {self.folder} "
                f"(those are from {self.tokenizer_kind} {self.tokenizer_sha256[:12]})",
                file=origin,
                remedy="prepare the data with this tokenizer, or use the data's own",
            )


def record_of(content: Content) -> np.dtype[np.void]:
    """One entry of the offset tables of a data set."""
    return _RECORDS.get(content, EXAMPLE_RECORD)


def save_index(
    folder: Path,
    shards: list[ShardInfo],
    dtype: str,
    tokenizer: Tokenizer,
    holds: Content,
    labels: tuple[str, ...] = (),
) -> ShardIndex:
    """Write ``index.json``, which makes the folder a data set."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "content": holds,
        "dtype": dtype,
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "shards": [asdict(shard) for shard in shards],
    }
    if labels:
        content["labels"] = list(labels)
    content["sha256"] = _own_hash(content)
    write_atomic(folder / INDEX_NAME, (json.dumps(content, indent=1) + "\n").encode())
    return load_index(folder)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _own_hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return _sha256(json.dumps(rest, sort_keys=True).encode())


def load_index(data_set: Path | str | Store, cache: CacheConfig | None = None) -> ShardIndex:
    """Read and check ``index.json``.

    Args:
        data_set: Its folder: a path, ``file:``, ``http(s)://`` or ``s3://``; or a store of it.
        cache: Where a remote one keeps what was read; None is the default place.

    Returns:
        The index; no shard is opened.

    Raises:
        DataError: If there is none, it is of another version, or it was damaged.
    """
    store = open_store(data_set, cache) if isinstance(data_set, Path | str) else data_set
    folder, path = store.folder, store.place(INDEX_NAME)
    try:
        text = store.read(INDEX_NAME)
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise DataError(
            f"holds no {INDEX_NAME}, so it is not a data set",
            file=folder,
            remedy="make one with `haloformer prepare`, and name its train or eval folder",
        ) from fault
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"not JSON ({fault})", file=path, remedy=_REMEDY) from fault
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"not a {FORMAT} index", file=path, remedy=_REMEDY)
    if content.get("version") != VERSION:
        raise DataError(
            f"format version {content.get('version')!r}, this program reads {VERSION}",
            file=path,
            remedy="prepare the data again",
        )
    if content.get("sha256") != _own_hash(content):
        raise DataError("its content does not match its own hash", file=path, remedy=_REMEDY)
    try:
        index = _parse(store, content)
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise DataError(f"malformed ({fault!r})", file=path, remedy=_REMEDY) from fault
    sizes = {shard.name: shard.size for shard in index.shards}
    for shard in index.shards:
        sizes[shard.table_name] = shard.num_samples * index.record.itemsize
    store.pin(index.sha256, sizes)
    return index


def _parse(store: Store, content: dict[str, Any]) -> ShardIndex:
    tokenizer = content["tokenizer"]
    shards = tuple(ShardInfo(**entry) for entry in content["shards"])
    for shard in shards:
        # The name becomes a path, so it must not lead out of the folder.
        if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"shard name {shard.name!r}")
        for entry in fields(shard):
            value = getattr(shard, entry.name)
            if "sha256" in entry.name and not _HASH.fullmatch(value):
                raise ValueError(f"{shard.name}: {entry.name} {value!r}")
            if entry.name.startswith(("num_", "size")) and (type(value) is not int or value < 0):
                raise ValueError(f"{shard.name}: {entry.name} {value!r}")
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("a shard is named twice")
    if sum(shard.num_tokens for shard in shards) == 0:
        raise ValueError("there is no token in it")
    if content["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {content['dtype']!r}")
    holds = content.get("content", "documents")  # older data sets hold documents and do not say so
    if holds not in get_args(Content):
        raise ValueError(f"content {holds!r}")
    labels = content.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels {labels!r}")
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels!r}")
    if bool(labels) != (holds == "classification"):
        raise ValueError(f"{len(labels)} labels, content {holds!r}")
    return ShardIndex(
        folder=store.folder,
        store=store,
        shards=shards,
        dtype=content["dtype"],
        tokenizer_kind=str(tokenizer["kind"]),
        tokenizer_sha256=str(tokenizer["sha256"]),
        vocab_size=int(tokenizer["vocab_size"]),
        sha256=content["sha256"],
        content=holds,
        labels=tuple(labels),
    )


def load_table(index: ShardIndex, shard: int) -> NDArray[np.void]:
    """Read the offset table of one shard: ``index.record`` [num_samples], read-only.

    Raises:
        DataError: If it is missing or not the one that was written.
    """
    info = index.shards[shard]
    path = index.store.place(info.table_name)
    try:
        content = index.store.read_known(info.table_name)
        # Cached wrong, it would stay wrong.
        if _sha256(content) != info.table_sha256 and index.store.forget(
            info.table_name, 0, len(content)
        ):
            content = index.store.read_known(info.table_name)
    except FileNotFoundError as fault:
        raise DataError("the offset table is missing", file=path, remedy=_REMEDY) from fault
    if _sha256(content) != info.table_sha256:
        raise DataError("the offset table is damaged (wrong sha256)", file=path, remedy=_REMEDY)
    if len(content) != info.num_samples * index.record.itemsize:
        raise DataError(
            f"the offset table has not {info.num_samples} records", file=path, remedy=_REMEDY
        )
    table = np.frombuffer(content, index.record)
    lengths = table["num_tokens"]
    if int(lengths.sum(dtype=np.int64)) != info.num_tokens:
        raise DataError(
            f"the offset table does not sum to {info.num_tokens} tokens", file=path, remedy=_REMEDY
        )
    if len(table) and not lengths.all():
        raise DataError(
            "the document has no tokens",
            file=path,
            sample=int(np.argmin(lengths)),
            remedy="prepare the data again, which leaves empty texts out",
        )
    if "note_size" in (table.dtype.names or ()) and (table["note_size"] > MAX_NOTE_BYTES).any():
        raise DataError(
            f"an annotation is longer than {MAX_NOTE_BYTES} bytes", file=path, remedy=_REMEDY
        )
    return table
