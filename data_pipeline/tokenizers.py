"""Tokenizers: bytes, and byte-level BPE (RoBERTa's), saved beside the shards they made.

Ours put the specials where RoBERTa does: <s> 0, <pad> 1, </s> 2, <unk> 3, then the tokens, <mask>
last. A folder brought by a user keeps its own ids. Text that spells "<mask>" is ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import write_atomic

SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TOKENIZER_RECORD = "tokenizer_kind.json"
TOKENIZER_FILES = (TOKENIZER_RECORD, "vocab.json", "merges.txt")  # the last two of BPE only
_NUM_BYTES = 256
_REMEDY = "copy the tokenizer's files again; they are those of a RoBERTa-like model"
# Encoding keeps about 100 bytes per token; long documents go through in pieces of this size.
_PIECE_CHARACTERS = 1 << 18


class Specials(NamedTuple):
    """Ids of the special tokens."""

    bos: int
    pad: int
    eos: int
    unk: int
    mask: int


class Tokenizer(Protocol):
    """What the rest of the pipeline asks of a tokenizer."""

    @property
    def kind(self) -> str:
        """``byte`` or ``bpe``."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""

    @property
    def specials(self) -> Specials:
        """Ids of the special tokens."""

    @property
    def sha256(self) -> str:
        """Hash of all that decides the ids of a text."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [n], without special tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, broken UTF-8 is replaced."""

    def byte_lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of UTF-8 that each token of a text stands for, int64 [n]; they add up to it."""

    def save(self, folder: Path) -> None:
        """Write it into a folder that ``load_tokenizer`` reads."""


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token."""

    kind = "byte"
    vocab_size = _NUM_BYTES + len(SPECIAL_NAMES)
    specials = Specials(0, 1, 2, 3, _NUM_BYTES + 4)
    sha256 = hashlib.sha256(b"haloformer byte tokenizer 1").hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [n], without special tokens."""
        return self.encode_bytes(text.encode("utf-8"))

    def encode_bytes(self, content: bytes) -> NDArray[np.int64]:
        """Ids of bytes that need not be text, int64 [n]."""
        return np.frombuffer(content, np.uint8).astype(np.int64) + 4

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, broken UTF-8 is replaced."""
        values = [i - 4 for i in ids if 0 <= i - 4 < _NUM_BYTES]
        return bytes(values).decode("utf-8", "replace")

    def byte_lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of UTF-8 that each token of a text stands for, int64 [n]; they add up to it."""
        return np.ones(len(ids), np.int64)

    def save(self, folder: Path) -> None:
        """Write it into a folder that ``load_tokenizer`` reads."""
        _save_record(folder, self)


@dataclass(frozen=True)
class BpeTokenizer:
    """Byte-level BPE. Build it with ``load_bpe`` or ``train_bpe``."""

    tokens: tuple[str, ...]  # in the order of their ids
    merges: tuple[tuple[str, str], ...]
    specials: Specials
    sha256: str
    engine: Engine

    kind = "bpe"

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""
        return len(self.tokens)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [n], without special tokens."""
        ids = [self.engine.encode(piece).ids for piece in _pieces(text)]
        return np.concatenate([np.asarray(part, np.int64) for part in ids] or [np.empty(0, int)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, broken UTF-8 is replaced."""
        kept = [int(i) for i in ids if i not in self.specials]
        return self.engine.decode(kept, skip_special_tokens=False)

    def byte_lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of UTF-8 that each token of a text stands for, int64 [n]; they add up to it."""
        return self._lengths[ids]

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        # A token's name has a character for every byte.
        return np.array([len(token) for token in self.tokens], np.int64)

    def save(self, folder: Path) -> None:
        """Write it into a folder that ``load_tokenizer`` reads."""
        vocab = {token: number for number, token in enumerate(self.tokens)}
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        write_atomic(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
        write_atomic(folder / "merges.txt", f"#version: 0.2\n{merges}".encode())
        _save_record(folder, self)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where the pre-tokenizer cuts anyway: before a blank after a non-blank."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        while end < len(text) and not (text[end] == " " and not text[end - 1].isspace()):
            end += 1
        yield text[start:end]
        start = end
    yield text[start:]


def _save_record(folder: Path, tokenizer: Tokenizer) -> None:
    record = {"kind": tokenizer.kind, "sha256": tokenizer.sha256}
    write_atomic(folder / TOKENIZER_RECORD, json.dumps(record).encode())


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load what ``save`` wrote.

    Args:
        folder: ``tokenizer`` in a data set.

    Returns:
        Bytes, or byte-level BPE.

    Raises:
        DataError: If files are missing, malformed, or not the ones that were saved.
    """
    path = folder / TOKENIZER_RECORD
    record = _read_json(path)
    tokenizer: Tokenizer
    if record.get("kind") == "byte":
        tokenizer = ByteTokenizer()
    elif record.get("kind") == "bpe":
        tokenizer = load_bpe(folder)
    else:
        raise DataError(
            f"unknown tokenizer kind {record.get('kind')!r}",
            file=path,
            remedy="restore the folder or prepare the data again",
        )
    if record.get("sha256") != tokenizer.sha256:
        raise DataError(
            "vocab.json or merges.txt is not the one that was saved here",
            file=path,
            remedy="restore the folder or prepare the data again",
        )
    return tokenizer


def load_bpe(folder: Path) -> BpeTokenizer:
    """Load byte-level BPE from ``vocab.json`` and ``merges.txt`` (RoBERTa, BART, Longformer, LED).

    Raises:
        DataError: If a file is missing or malformed, ids have gaps, special tokens or bytes are
            absent, or a merge makes a token that the vocabulary lacks.
    """
    path = folder / "vocab.json"
    entries = _read_json(path)
    vocab = {token: number for token, number in entries.items() if type(number) is int}
    if len(vocab) != len(entries):
        raise DataError("an id is not an integer", file=path, remedy=_REMEDY)
    tokens = tuple(sorted(vocab, key=lambda token: vocab[token]))
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise DataError(
            f"the ids are not 0 to {len(tokens) - 1}, each once", file=path, remedy=_REMEDY
        )
    absent = [name for name in SPECIAL_NAMES if name not in vocab]
    if absent:
        raise DataError(
            f"the vocabulary lacks {' '.join(absent)}",
            file=path,
            remedy="a RoBERTa-like vocabulary is needed; --tokenizer train:N makes one",
        )
    missing_bytes = sum(char not in vocab for char in pre_tokenizers.ByteLevel.alphabet())
    if missing_bytes:
        raise DataError(
            f"{missing_bytes} of the 256 bytes have no token", file=path, remedy=_REMEDY
        )
    merges = tuple(_read_merges(folder / "merges.txt", vocab))
    specials = Specials(*(vocab[name] for name in SPECIAL_NAMES))
    canonical = json.dumps(["bpe", tokens, merges], separators=(",", ":"))
    return BpeTokenizer(
        tokens,
        merges,
        specials,
        hashlib.sha256(canonical.encode()).hexdigest(),
        _engine(models.BPE(vocab=vocab, merges=list(merges))),
    )


def _engine(model: Any) -> Engine:
    # No special token is registered: text that spells one must not become one.
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as fault:
        raise DataError("no such file", file=path, remedy="is this a tokenizer?") from fault
    except (ValueError, RecursionError) as fault:
        raise DataError(f"not JSON ({fault})", file=path, remedy=_REMEDY) from fault
    if not isinstance(value, dict):
        raise DataError("not a JSON object", file=path, remedy=_REMEDY)
    return value


def _read_merges(path: Path, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError as fault:
        raise DataError("no such file", file=path, remedy="is this a tokenizer?") from fault
    except UnicodeDecodeError as fault:
        raise DataError(f"byte {fault.start} is not UTF-8", file=path, remedy=_REMEDY) from fault
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#version"):
            continue
        left, blank, right = line.rstrip("\r").partition(" ")
        if not blank or " " in right:
            raise DataError(
                "a merge is two tokens and a blank", file=f"{path}:{number}", remedy=_REMEDY
            )
        for token in (left, right, left + right):
            if token not in vocab:
                raise DataError(
                    f"{token!r} is not in vocab.json", file=f"{path}:{number}", remedy=_REMEDY
                )
        yield left, right


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Train byte-level BPE in RoBERTa's layout.

    Args:
        texts: The corpus; it is read once.
        vocab_size: Tokens with the specials; a small corpus may yield fewer.

    Raises:
        DataError: If ``vocab_size`` cannot hold bytes and specials.
    """
    smallest = _NUM_BYTES + len(SPECIAL_NAMES)
    if vocab_size < smallest:
        raise DataError(
            f"train:{vocab_size}: the vocabulary needs at least {smallest} tokens",
            remedy="give --tokenizer train:8192, say, or byte",
        )
    engine = _engine(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL_NAMES[:-1]),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engine.model.save(scratch)
        vocab = _read_json(folder / "vocab.json")
        vocab[SPECIAL_NAMES[-1]] = len(vocab)
        (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
        return load_bpe(folder)
