"""An LED and its tokenizer: texts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from haloformer.data_pipeline.tokenizer_json import TOKENIZER_JSON, engine_of
from haloformer.data_pipeline.tokenizers import Tokenizer, load_bpe
from haloformer.launcher.load_model import load_run
from haloformer.model.convert import load_pretrained
from haloformer.model.generate import SearchSettings
from haloformer.model.plain import PlainModel
from haloformer.model.plain_led import PlainLed

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Summarizer:
    """Writes answers to documents.

    Attributes:
        model: In eval mode, on the device it shall run on.
        encode: Text -> ids with <s> before and </s> after.
        decode: Ids without special tokens -> text.
        name: Of the run or folder, for messages.
        has_globals: Whether <s> of a source is a global token.
    """

    model: PlainLed
    encode: Encode
    decode: Decode
    name: str
    has_globals: bool

    @property
    def source_limit(self) -> int:
        """Most tokens of a source, <s> and </s> included."""
        limit: int = self.model.raw_config["max_encoder_position_embeddings"]
        return limit

    @property
    def target_limit(self) -> int:
        """Most tokens of an answer, the start token included."""
        limit: int = self.model.raw_config["max_decoder_position_embeddings"]
        return limit

    def cut(self, ids: list[int]) -> list[int]:
        """A source that is too long, cut to the limit; it still ends with its last token, </s>."""
        return ids if len(ids) <= self.source_limit else [*ids[: self.source_limit - 1], ids[-1]]

    def answer(self, sources: Sequence[list[int]], settings: SearchSettings) -> list[str]:
        """Answer a batch of sources.

        Args:
            sources: From ``encode``, at most ``source_limit`` ids each.
            settings: How to search; its special tokens are not looked at.
        """
        pad, raw = self.model.pad_token_id, self.model.raw_config
        device = next(self.model.parameters()).device
        width = max(len(ids) for ids in sources)
        padded = [ids + [pad] * (width - len(ids)) for ids in sources]
        input_ids = torch.tensor(padded, device=device)  # [B, N]
        lengths = torch.tensor([len(ids) for ids in sources], device=device)
        places = torch.arange(width, device=device)[None]
        found = self.model.generate(
            input_ids,
            places < lengths[:, None],
            ((places == 0) & self.has_globals).expand_as(input_ids),
            max_length=settings.max_length,
            min_length=settings.min_length,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            early_stopping=settings.early_stopping,
        )
        special = {pad, raw["bos_token_id"], raw["eos_token_id"], raw["decoder_start_token_id"]}
        return [self.decode([i for i in row if i not in special]) for row in found.tolist()]


def open_summarizer(
    name: str, step: int | None, experiment: str | None, data: Path | None
) -> Summarizer:
    """Load an LED by the id of its run, ``latest``, or a transformers folder.

    Args:
        name: Of the run or folder.
        step: Checkpoint of a run; None is the newest.
        experiment: Where ``latest`` is looked for.
        data: Where the run's training data is now, if it moved.

    Raises:
        ValueError: If there is none, it cannot be loaded, or it is no LED.
    """
    has_globals = True  # of a folder, as transformers' LEDs were trained; config.json does not say
    if (Path(name) / "config.json").is_file():
        model = load_pretrained(name)
        assert isinstance(model, PlainModel)
        encode, decode = _tokenizer_of_folder(Path(name), model)
    elif Path(name).is_dir():
        raise ValueError(f"{name}: no config.json; name a run or the folder of a model")
    else:
        trained = load_run(name, step, experiment=experiment, data=data)
        model, name = trained.model, f"run {trained.run_id}, step {trained.step}"
        encode, decode = _own(trained.tokenizer)
        has_globals = trained.config.data.global_tokens == "first"
    if not isinstance(model, PlainLed):
        kind = type(model).__name__.removeprefix("Plain")
        raise ValueError(f"{name}: holds a {kind}, which writes no text; name an LED")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Summarizer(model.to(device), encode, decode, name, has_globals)


def _own(tokenizer: Tokenizer) -> tuple[Encode, Decode]:
    bos, eos = tokenizer.specials.bos, tokenizer.specials.eos
    return lambda text: [bos, *tokenizer.encode(text).tolist(), eos], tokenizer.decode


def _tokenizer_of_folder(folder: Path, model: PlainModel) -> tuple[Encode, Decode]:
    """tokenizer.json, or the older vocab.json and merges.txt."""
    engine = engine_of(folder)
    if engine is None:
        if (folder / "vocab.json").is_file():
            return _own(load_bpe(folder))
        raise ValueError(f"{folder}: no {TOKENIZER_JSON}; copy the tokenizer of the model there")
    known = model.raw_config["vocab_size"]
    if engine.get_vocab_size() > known:
        raise ValueError(
            f"{folder / TOKENIZER_JSON}: has {engine.get_vocab_size()} tokens, the model {known}; "
            "it is another's"
        )
    # Both may be on from the tokenizer's training, with the length of another model.
    engine.no_truncation()
    engine.no_padding()
    bos, eos = [model.raw_config["bos_token_id"]], [model.raw_config["eos_token_id"]]

    def encode(text: str) -> list[int]:
        ids: list[int] = engine.encode(text).ids
        # A tokenizer without a post-processor adds neither.
        return (bos if ids[:1] != bos else []) + ids + (eos if ids[-1:] != eos else [])

    return encode, engine.decode
