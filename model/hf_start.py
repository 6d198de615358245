"""Starting a model from a folder of transformers: what fits, what fills which parameter.

    folder (LongformerForMaskedLM)            model (longformer_qa)
    longformer.embeddings ..., encoder ...  -> encoder ...
    lm_head ...                                              not used
                                               head.output   new

The encoder always comes from the folder. A head does where the folder has one of its kind and
shape, and starts from random weights where it does not.
"""

from __future__ import annotations

from typing import Any

from haloformer.configs.models import (
    ClassifierConfig,
    EncoderConfig,
    LedConfig,
    ModelConfig,
    QuestionsConfig,
)
from haloformer.model.hf_config import (
    LED_DEFAULTS,
    LONGFORMER_DEFAULTS,
    TokenIds,
    led_config,
    longformer_config,
    with_defaults,
)
from haloformer.model.hf_folder import StoredWeights
from haloformer.model.hf_names import CLASSIFIER, LM_HEAD, QA_HEAD, Names, led, longformer_encoder

LOGITS_BIAS = "final_logits_bias"
# Numbers that have to be the same; of positions a folder may have more than are used.
_ENCODER_SIZES = (
    *("hidden_size", "num_layers", "num_heads", "ffn_size"),
    *("layer_norm_eps", "type_vocab_size", "padding_position"),
)
_LED_SIZES = (
    "hidden_size",
    *(
        f"{half}_{size}"
        for half in ("encoder", "decoder")
        for size in ("layers", "heads", "ffn_size")
    ),
)
_HEADS: dict[type[EncoderConfig], Names] = {
    ModelConfig: LM_HEAD,
    ClassifierConfig: CLASSIFIER,
    QuestionsConfig: QA_HEAD,
}


def architecture_of(raw: dict[str, Any]) -> str:
    """The class of transformers that a config.json names; "" if it names none."""
    named = raw.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def start_faults(
    config: EncoderConfig | LedConfig, vocab_size: int, tokens: TokenIds, raw: dict[str, Any]
) -> list[str]:
    """Why a model cannot start from a folder, every reason; empty if it can.

    Args:
        config: The model that is to be trained.
        vocab_size: Entries of its token embedding.
        tokens: Special tokens of its data.
        raw: config.json of the folder.

    Raises:
        ValueError: If our layers do not have what the folder's model is made of.
    """
    is_led, named = isinstance(config, LedConfig), architecture_of(raw)
    if named != "LEDForConditionalGeneration" if is_led else not named.startswith("Longformer"):
        wanted = "LEDForConditionalGeneration" if is_led else "Longformer"
        short = "BART" if is_led else "RoBERTa"
        return [
            f"it holds a {named or 'model without a name'}, and a {config.kind} starts from a "
            f"{wanted}; make one of a {short} with 'haloformer convert'"
        ]
    theirs = led_config(raw) if is_led else longformer_config(raw)
    faults = [
        f"model.{key} is {getattr(config, key)}, the folder's {getattr(theirs, key)}"
        for key in (_LED_SIZES if is_led else _ENCODER_SIZES)
        if getattr(config, key) != getattr(theirs, key)
    ]
    for key in ("max_source_positions", "max_target_positions") if is_led else ("max_positions",):
        if getattr(config, key) > getattr(theirs, key):
            faults.append(
                f"model.{key} is {getattr(config, key)}, the folder has {getattr(theirs, key)}; "
                "convert the short model to more with --max-positions"
            )
    full = with_defaults(raw, LED_DEFAULTS if is_led else LONGFORMER_DEFAULTS)
    if full["vocab_size"] != vocab_size:
        faults.append(
            f"its vocabulary has {full['vocab_size']} tokens, the data's tokenizer {vocab_size}; "
            "prepare the data with the tokenizer of the folder"
        )
    faults += [
        f"its {name}_token_id is {raw[f'{name}_token_id']}, the data's tokenizer has {number}"
        for name, number in tokens._asdict().items()
        if raw.get(f"{name}_token_id") not in (None, number)
    ]
    return faults


def stored_names(config: EncoderConfig | LedConfig, stored: StoredWeights) -> tuple[Names, Names]:
    """Our parameters -> the tensors of a folder that fill them.

    Returns:
        Those that have to come from it, and those of a head, as far as it has one.

    Raises:
        ValueError: If the folder lacks a part of the encoder, or of an LED, or has what an LED
            cannot keep.
    """
    head: Names = {}
    if isinstance(config, LedConfig):
        names = led(config.encoder_layers, config.decoder_layers)
        _refuse_logits_bias(stored)
    else:
        below = (
            "longformer." if any(name.startswith("longformer.") for name in stored.names) else ""
        )
        names = longformer_encoder(config.num_layers, below)
        head = _HEADS.get(type(config), {})
    missing = sorted(theirs for theirs in names.values() if theirs not in stored.names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{stored.folder}: lacks {missing[0]}{more}; is the folder whole?")
    return names, {ours: theirs for ours, theirs in head.items() if theirs in stored.names}


def _refuse_logits_bias(stored: StoredWeights) -> None:
    """A constant per token that is never trained: our checkpoints do not hold it."""
    if LOGITS_BIAS in stored.names and bool(stored.part(LOGITS_BIAS).any()):
        raise ValueError(
            f"{stored.folder}: {LOGITS_BIAS} is not zero, which checkpoints of a run could not "
            "keep; set it to zero in the folder if its effect may be lost, or finetune with "
            "load_pretrained in a loop of your own"
        )
