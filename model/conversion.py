"""Short models made long: RoBERTa -> Longformer, BART -> LED.

The sliding window starts from the weights of full attention: queries, keys and values are copied
for the global tokens, and the learned positions are repeated (Longformer, section 5)::

    positions of RoBERTa      p0 p1 | 0 1 2 ... 511           p0, p1: rows that no token uses
    of the Longformer         p0 p1 | 0 1 2 ... 511 0 1 2 ... 511 0 1 2 ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haloformer.model.hf_config import LED_DEFAULTS, LONGFORMER_DEFAULTS
from haloformer.model.hf_folder import read_config, read_weights, write_folder

_BART_OFFSET = 2  # BART's position table begins with two rows that no token uses
_TOKENIZER_FILES = (
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# Copies of the shared table, and numbers that fairseq left in the published BARTs.
_BART_IGNORED = (
    "lm_head.weight",
    "model.encoder.embed_tokens.weight",
    "model.encoder.version",
    "model.decoder.version",
)
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def convert_folder(
    source: str | Path, target: str | Path, max_positions: int, attention_window: int
) -> None:
    """Convert a transformers RoBERTa or BART to a Longformer or LED that transformers loads.

    Args:
        source: Folder with config.json and safetensors.
        target: New folder; tokenizer files come along.
        max_positions: Tokens that the new encoder can read, 4096 or 16384, say.
        attention_window: Two-sided window of every layer, even.

    Raises:
        ValueError: If the source is damaged or of another kind, or a number does not fit.
    """
    source, target = Path(source), Path(target)
    raw, weights = read_config(source), read_weights(source)
    if attention_window < 2 or attention_window % 2:
        raise ValueError(
            f"attention window {attention_window} is not an even number of at least 2; it counts "
            "both sides"
        )
    convert = {"roberta": _longformer_from_roberta, "bart": _led_from_bart}.get(
        str(raw.get("model_type"))
    )
    if convert is None:
        raise ValueError(
            f"{source}: model_type is {raw.get('model_type')!r}; only roberta and bart can be "
            "converted"
        )
    config, converted = convert(raw, weights, max_positions)
    layers = config["num_hidden_layers" if "num_hidden_layers" in config else "encoder_layers"]
    write_folder(target, {**config, "attention_window": [attention_window] * layers}, converted)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _tell_tokenizer(target / "tokenizer_config.json", max_positions)


def _tell_tokenizer(path: Path, max_positions: int) -> None:
    """Lift the length at which transformers' tokenizer cuts, where one is written down."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "model_max_length" in settings:
        settings["model_max_length"] = max_positions
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def repeat_positions(table: Tensor, num_reserved: int, max_positions: int, num_kept: int) -> Tensor:
    """A longer position table.

    Args:
        table: [R + P, E], R reserved rows before P learned positions.
        num_reserved: R.
        max_positions: Positions wanted.
        num_kept: How many reserved rows the result begins with, R or 0.

    Returns:
        [num_kept + max_positions, E]: the learned positions repeated as often as fits.

    Raises:
        ValueError: If the table has more positions than wanted.
    """
    learned = table[num_reserved:]
    if max_positions < len(learned):
        raise ValueError(
            f"max positions {max_positions} is less than the {len(learned)} that the model has"
        )
    times = -(-max_positions // len(learned))
    return torch.cat([table[:num_kept], learned.repeat(times, 1)[:max_positions]])


def _longformer_from_roberta(
    raw: Mapping[str, Any], weights: Mapping[str, Tensor], max_positions: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    architecture = (raw.get("architectures") or ["RobertaForMaskedLM"])[0]
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        renamed = (
            name.replace("roberta.", "longformer.", 1) if name.startswith("roberta.") else name
        )
        converted[renamed] = tensor
        part = name.rsplit(".", 2)[-2]
        if ".attention.self." in name and part in ("query", "key", "value"):
            converted[renamed.replace(f".{part}.", f".{part}_global.")] = tensor.clone()
    reserved = raw.get("pad_token_id", 1) + 1
    for name in list(converted):
        if name.endswith("embeddings.position_embeddings.weight"):
            table = converted[name]
            converted[name] = repeat_positions(table, reserved, max_positions, reserved)
        elif name.endswith("position_ids"):
            del converted[name]
    below = "longformer." if any(name.startswith("longformer.") for name in converted) else ""
    words = _needed(converted, f"{below}embeddings.word_embeddings.weight")
    known = {key: value for key, value in raw.items() if key != "position_embedding_type"}
    config = {
        **LONGFORMER_DEFAULTS,
        **known,
        "architectures": [architecture.replace("Roberta", "Longformer")],
        "model_type": "longformer",
        "max_position_embeddings": max_positions + reserved,
        "vocab_size": words.shape[0],
    }
    return config, converted


def _led_from_bart(
    raw: Mapping[str, Any], weights: Mapping[str, Tensor], max_positions: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for key in ("scale_embedding", "normalize_before", "add_final_layer_norm"):
        if raw.get(key):
            raise ValueError(f"config.json: {key} is true, which LED does not have")
    if not any(name.startswith("model.") for name in weights):
        # A BartModel, as the published facebook/bart-base and -large are.
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in _BART_IGNORED:
            continue
        if name == "model.decoder.embed_tokens.weight":
            converted.setdefault("led.shared.weight", tensor)
        elif name == "final_logits_bias":
            converted[name] = tensor
        elif name.startswith("model.encoder.layers.") and ".self_attn." in name:
            converted |= _encoder_attention(name, tensor)
        else:
            converted[name.replace("model.", "led.", 1)] = tensor
    for side, wanted in (("encoder", max_positions), ("decoder", None)):
        name = f"led.{side}.embed_positions.weight"
        table = _needed(converted, name)
        length = len(table) - _BART_OFFSET if wanted is None else wanted
        # transformers' LED has no reserved rows.
        converted[name] = repeat_positions(table, _BART_OFFSET, length, 0)
    shared = _needed(converted, "led.shared.weight")
    converted.setdefault("final_logits_bias", shared.new_zeros(1, shared.shape[0]))
    known = {key: raw[key] for key in LED_DEFAULTS if key in raw}
    config = {
        **LED_DEFAULTS,
        **known,
        "architectures": ["LEDForConditionalGeneration"],
        "model_type": "led",
        "is_encoder_decoder": True,
        "max_encoder_position_embeddings": max_positions,
        "max_decoder_position_embeddings": len(converted["led.decoder.embed_positions.weight"]),
        "vocab_size": shared.shape[0],
    }
    return config, converted


def _needed(converted: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in converted:
        raise ValueError(f"the safetensors hold nothing for {name}; is the folder whole?")
    return converted[name]


def _encoder_attention(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """``...self_attn.q_proj.weight`` -> the local and the global query of LED."""
    layer, _, rest = name.replace("model.", "led.", 1).partition(".self_attn.")
    part, kind = rest.split(".")
    if part == "out_proj":
        return {f"{layer}.self_attn.output.{kind}": tensor}
    inner = f"{layer}.self_attn.longformer_self_attn.{_PROJECTIONS[part]}"
    return {f"{inner}.{kind}": tensor, f"{inner}_global.{kind}": tensor.clone()}
