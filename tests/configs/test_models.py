"""The kinds of models that learn from annotated examples, as a recipe names them."""

import pytest

from haloformer.configs.load import ConfigError, parse_config
from haloformer.configs.models import MODEL_CONFIGS, CorefConfig, EncoderConfig
from launcher_runs import TINY

READS = {
    "longformer_classifier": "classification",
    "longformer_qa": "questions",
    "longformer_choice": "choices",
    "longformer_coref": "coreference",
}


def recipe(kind, data=None, **model):
    section = {**TINY["model"], "kind": kind, **model}
    return {**TINY, "model": section, "data": {**TINY["data"], **(data or {})}}


@pytest.mark.parametrize("kind", READS)
def test_a_kind_is_an_encoder_and_names_what_it_reads(kind):
    model = parse_config(recipe(kind), "here").model
    assert isinstance(model, EncoderConfig) and type(model) is MODEL_CONFIGS[kind]
    assert (model.kind, model.reads, model.hidden_size) == (kind, READS[kind], 32)


def test_the_sizes_of_a_coreference_head_are_the_fields_own():
    model = parse_config(recipe("longformer_coref"), "here").model
    assert isinstance(model, CorefConfig)
    assert (model.max_span_width, model.top_span_ratio, model.num_antecedents) == (30, 0.4, 50)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (recipe("longformer_nli"), r"model\.kind: .* longformer_qa, .*char_lm"),
        (recipe("longformer_classifier", num_labels=2), r"model\.num_labels: unknown key"),
        (recipe("longformer_coref", top_span_ration=0.4), r"unknown key \(top_span_ratio\?\)"),
        (recipe("longformer_coref", top_span_ratio=0), r"model\.top_span_ratio: .* greater than 0"),
        (recipe("longformer_qa", max_span_width=3), r"model\.max_span_width: unknown key"),
        (recipe("longformer_qa", attention_window=5), "attention_window 5 is odd"),
        (
            recipe("longformer_choice", {"target_len": 8}),
            "target_len is for pairs; a longformer_choice reads choices",
        ),
        (
            recipe("longformer_classifier", {"isolate_documents": True}),
            "isolate_documents is for packed text; a longformer_classifier reads classification",
        ),
    ],
)
def test_what_a_kind_does_not_have_is_named(raw, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(raw, "here")
