"""Our tokenizers as files that transformers and ``tokenizers`` load.

In tokenizer.json no special token is registered, so that it encodes every text as we do, one that
spells "<mask>" as well; tokenizer_config.json names them, so transformers, which looks for them in
texts, knows their ids.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, processors

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import write_atomic
from haloformer.data_pipeline.tokenizers import (
    SPECIAL_NAMES,
    TOKENIZER_RECORD,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    load_bpe,
    load_tokenizer,
)

TOKENIZER_JSON = "tokenizer.json"
_ROLES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
}


def write_for_transformers(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, and the files that we ourselves load.

    Args:
        tokenizer: Bytes or byte-level BPE.
        folder: Of the model.
        max_length: Tokens that the model can read.
    """
    engine = fast_tokenizer(tokenizer)
    write_atomic(folder / TOKENIZER_JSON, engine.to_str(pretty=True).encode())
    settings = {
        **_ROLES,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_atomic(folder / "tokenizer_config.json", json.dumps(settings, indent=2).encode())
    tokenizer.save(folder)


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """A ``tokenizers.Tokenizer`` with the same ids, which puts <s> before a text and </s> after.

    Args:
        tokenizer: Bytes or byte-level BPE.
    """
    specials = tokenizer.specials
    if isinstance(tokenizer, BpeTokenizer):
        vocab = {token: number for number, token in enumerate(tokenizer.tokens)}
        merges = list(tokenizer.merges)
    else:
        # Bytes are BPE that merges nothing.
        vocab = dict(zip(SPECIAL_NAMES, specials, strict=True))
        vocab |= {char: byte + 4 for byte, char in enumerate(byte_characters())}
        merges = []
    engine = Engine(models.BPE(vocab=vocab, merges=merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", specials.bos), ("</s>", specials.eos)],
    )
    return engine


def engine_of(folder: Path) -> Engine | None:
    """What a folder's tokenizer.json holds, None if it has none.

    Raises:
        DataError: If it is not a tokenizer.
    """
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        return None
    try:
        return Engine.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"not a tokenizer ({error})", file=path, remedy="copy it again") from error


def tokenizer_sha256_of(folder: Path) -> str | None:
    """Which tokenizer a folder of transformers (or of ours) has; None if it has none that we read.

    Files that we can read are ours, vocab.json with merges.txt, and byte-level BPE in
    tokenizer.json.

    Raises:
        DataError: If its files are malformed.
    """
    if (folder / TOKENIZER_RECORD).is_file():
        return load_tokenizer(folder).sha256
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _sha256(load_bpe(folder))
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        model = content["model"]
        if model["type"] != "BPE":
            return None
        # Special tokens may stand apart from the others.
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        vocab = {**model["vocab"], **added}
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        merges = "".join(f"{pair}\n" for pair in pairs)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not a tokenizer ({type(error).__name__})", file=path, remedy="copy it again"
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "vocab.json").write_text(json.dumps(vocab), "utf-8")
        Path(scratch, "merges.txt").write_text(merges, "utf-8")
        try:
            return _sha256(load_bpe(Path(scratch)))
        except DataError as fault:
            # The two files are gone when the message is read.
            told = str(fault)
            for name in ("vocab.json", "merges.txt"):
                told = told.replace(str(Path(scratch, name)), str(path))
            raise DataError(told) from fault


def _sha256(tokenizer: BpeTokenizer) -> str:
    """Its hash; bytes that transformers has written have become BPE that merges nothing."""
    bytes_alone = (*SPECIAL_NAMES[:-1], *byte_characters(), SPECIAL_NAMES[-1])
    if tokenizer.tokens == bytes_alone and not tokenizer.merges:
        return ByteTokenizer.sha256
    return tokenizer.sha256


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's).

    Visible Latin-1 stands for itself; the other bytes get the characters from 256 up, in order::

        byte 33 -> '!'      byte 0 -> chr(256)      byte 32 (blank) -> chr(288)
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
