"""Models in and out of transformers' folders.

model = load_pretrained("longformer-base-4096")
output = model(input_ids, attention_mask, global_attention_mask, labels=labels)
output.loss.backward()
save_pretrained(model, "tuned")          # transformers loads it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haloformer.configs.models import (
    ClassifierConfig,
    EncoderConfig,
    LedConfig,
    ModelConfig,
    QuestionsConfig,
)
from haloformer.model.classification import LongformerForSequenceClassification
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.hf_config import (
    LED_DEFAULTS,
    LONGFORMER_DEFAULTS,
    TokenIds,
    led_config,
    led_raw,
    longformer_config,
    longformer_raw,
    refuse_ours_alone,
    with_defaults,
)
from haloformer.model.hf_folder import dtype_name, read_config, read_weights, write_folder
from haloformer.model.hf_names import (
    CLASSIFIER,
    IGNORABLE,
    LM_HEAD,
    POOLER,
    QA_HEAD,
    Names,
    led,
    longformer_encoder,
    ours_from_theirs,
    theirs_from_ours,
)
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.plain import (
    PlainClassifier,
    PlainEncoder,
    PlainMaskedLM,
    PlainModel,
    PlainQuestionAnswering,
)
from haloformer.model.plain_led import PlainLed
from haloformer.model.question_answering import LongformerForQuestionAnswering

ARCHITECTURES = (
    "LongformerModel",
    "LongformerForMaskedLM",
    "LongformerForSequenceClassification",
    "LongformerForQuestionAnswering",
    "LEDForConditionalGeneration",
)
# What a run can become.
PlainTrained = PlainMaskedLM | PlainClassifier | PlainQuestionAnswering | PlainLed


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a transformers Longformer or LED as a plain module, in eval mode.

    Its call takes ``input_ids, attention_mask=None, global_attention_mask=None, labels=None`` and
    returns an object with ``.loss`` and ``.logits``; LED also takes ``decoder_input_ids=None``.
    ``attention_window`` in the folder is two-sided, as everywhere in transformers.

    Args:
        folder: config.json and model.safetensors (or several, with their index).
        dtype: Of the parameters.

    Returns:
        A :class:`~haloformer.model.plain.PlainModel`.

    Raises:
        ValueError: If the folder is damaged, holds a pickle, or a model of another kind.
    """
    path = Path(folder)
    raw, weights = read_config(path), read_weights(path)
    try:
        with torch.device("meta"):  # no memory and no time for values that are replaced anyway
            model = _build(raw, weights)
        names = parameter_names(model)
        state = ours_from_theirs(names, weights, IGNORABLE)
        _check_shapes(names, model, state)
        if isinstance(model, PlainLed):
            state["model.final_logits_bias"] = _logits_bias(weights)
    except ValueError as error:  # pydantic's error is one, of several lines
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    model.load_state_dict(state, assign=True)
    _tell_padding(model)
    return model.to(dtype).eval()


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a plain model to a folder that transformers loads.

    Args:
        model: From :func:`load_pretrained`.
        folder: New, or without a model.

    Raises:
        ValueError: If it is not a plain model, has what transformers does not have, or the folder
            holds a model already.
    """
    if not isinstance(model, PlainModel):
        raise ValueError(f"{type(model).__name__} is not a model from load_pretrained")
    refuse_ours_alone(model.raw_config)
    state = model.state_dict()
    bias = state.pop("model.final_logits_bias", None)
    weights = theirs_from_ours(parameter_names(model), state)
    if bias is not None:
        weights["final_logits_bias"] = bias[None]
    dtype = dtype_name(next(model.parameters()).dtype)
    write_folder(Path(folder), {**model.raw_config, "dtype": dtype}, weights)


def plain_from_config(
    config: EncoderConfig | LedConfig, vocab_size: int, tokens: TokenIds, labels: Sequence[str] = ()
) -> PlainTrained:
    """An untrained plain model of a recipe's section, in eval mode; ``.model`` is what trains.

    Args:
        config: Sizes of a model that transformers has.
        vocab_size: Entries of the token embedding.
        tokens: Special tokens of the tokenizer.
        labels: Names of a classifier's classes.

    Returns:
        A plain module; parameters fp32 on torch's default device, drawn from its generator.
    """
    model: PlainTrained
    if isinstance(config, LedConfig):
        led_model = LedForConditionalGeneration(config, vocab_size)
        model = PlainLed(led_model, led_raw(config, vocab_size, tokens))
    else:
        raw = longformer_raw(config, vocab_size, tokens, labels)
        if isinstance(config, ClassifierConfig):
            classifier = LongformerForSequenceClassification(config, vocab_size, len(labels))
            model = PlainClassifier(classifier, raw)
        elif isinstance(config, QuestionsConfig):
            model = PlainQuestionAnswering(LongformerForQuestionAnswering(config, vocab_size), raw)
        else:
            assert isinstance(config, ModelConfig)
            model = PlainMaskedLM(LongformerForMaskedLM(config, vocab_size), raw)
    _tell_padding(model)
    model.eval()
    return model


def parameter_names(model: PlainModel) -> Names:
    """Our name of every tensor of a plain model -> its name in transformers."""
    if isinstance(model, PlainEncoder):
        names = longformer_encoder(len(model.encoder.layers), prefix="")
        return names if model.pooler is None else names | POOLER
    if isinstance(model, PlainLed):
        parts = model.model
        names = led(len(parts.encoder.layers), len(parts.decoder.layers))
        return {f"model.{ours}": theirs for ours, theirs in names.items()}
    heads: dict[type[PlainModel], Names] = {
        PlainMaskedLM: LM_HEAD,
        PlainClassifier: CLASSIFIER,
        PlainQuestionAnswering: QA_HEAD,
    }
    assert isinstance(model, PlainMaskedLM | PlainClassifier | PlainQuestionAnswering)
    names = longformer_encoder(len(model.model.encoder.layers), prefix="longformer.")
    names = names | heads[type(model)]
    return {f"model.{ours}": theirs for ours, theirs in names.items()}


def _build(raw: dict[str, Any], weights: Mapping[str, Tensor]) -> PlainModel:
    """An untrained plain model of a folder's architecture and sizes."""
    architecture = _architecture(raw)
    if architecture == "LEDForConditionalGeneration":
        full = with_defaults(raw, LED_DEFAULTS)
        return PlainLed(LedForConditionalGeneration(led_config(raw), full["vocab_size"]), full)
    full = with_defaults(raw, LONGFORMER_DEFAULTS)
    config, vocab_size = longformer_config(raw), full["vocab_size"]
    if architecture == "LongformerForMaskedLM":
        return PlainMaskedLM(LongformerForMaskedLM(config, vocab_size), full)
    if architecture == "LongformerForSequenceClassification":
        # Where there is no head, ours_from_theirs says so.
        bias = weights.get("classifier.out_proj.bias")
        num_labels = 1 if bias is None else bias.shape[0]
        classifier = LongformerForSequenceClassification(config, vocab_size, num_labels)
        return PlainClassifier(classifier, full)
    if architecture == "LongformerForQuestionAnswering":
        return PlainQuestionAnswering(LongformerForQuestionAnswering(config, vocab_size), full)
    encoder = LongformerEncoder(config, vocab_size)
    return PlainEncoder(encoder, full, has_pooler="pooler.dense.weight" in weights)


def _architecture(raw: dict[str, Any]) -> str:
    named = raw.get("architectures")
    if not named:
        raise ValueError("config.json has no architectures; add, say, LongformerForMaskedLM")
    if named[0] not in ARCHITECTURES:
        raise ValueError(f"cannot load {named[0]!r}; known are {', '.join(ARCHITECTURES)}")
    return str(named[0])


def _check_shapes(names: Names, model: PlainModel, state: Mapping[str, Tensor]) -> None:
    for ours, wanted in model.named_parameters():
        found = state[ours]
        if found.shape != wanted.shape:
            raise ValueError(
                f"{names[ours]} has shape {tuple(found.shape)}, by config.json it is "
                f"{tuple(wanted.shape)}; config.json and the safetensors are of two models"
            )


def _logits_bias(weights: Mapping[str, Tensor]) -> Tensor:
    """[V]; transformers stores [1, V], and old folders leave it out, which means zeros."""
    bias = weights.get("final_logits_bias")
    embedding = weights["led.shared.weight"]
    return embedding.new_zeros(embedding.shape[0]) if bias is None else bias[0]


def _tell_padding(model: PlainModel) -> None:
    """Padding trains no embedding: transformers' tables leave its row out of the gradient."""
    for name, table in (
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    ):
        if name.endswith(("word_embeddings", "position_embeddings", "shared")):
            table.padding_idx = model.pad_token_id
