"""The parameter count from a recipe's numbers is that of the model that is built from it."""

import pytest

from haloformer.configs.models import ChoicesConfig, ClassifierConfig, CorefConfig, QuestionsConfig
from haloformer.configs.sizes import num_parameters
from haloformer.model.char_lm import CharLm
from haloformer.model.classification import LongformerForSequenceClassification
from haloformer.model.coreference import LongformerForCoreference
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.multiple_choice import LongformerForMultipleChoice
from haloformer.model.question_answering import LongformerForQuestionAnswering
from model_layouts import char_config, encoder_settings, led_config, longformer_config

SIZES = encoder_settings()


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (longformer_config(), LongformerForMaskedLM),
        (QuestionsConfig(**SIZES), LongformerForQuestionAnswering),
        (ChoicesConfig(**SIZES), LongformerForMultipleChoice),
        (CorefConfig(**SIZES), LongformerForCoreference),
        (led_config(encoder_layers=3, attention_window=4), LedForConditionalGeneration),
        (char_config(), CharLm),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_parameters_are_counted_as_the_model_has_them(config, model) -> None:
    built = model(config, 37)
    assert num_parameters(config, 37) == sum(p.numel() for p in built.parameters())


def test_a_classifier_has_as_many_as_its_data_has_classes() -> None:
    config = ClassifierConfig(**SIZES)
    built = LongformerForSequenceClassification(config, 37, 5)
    assert num_parameters(config, 37, 5) == sum(p.numel() for p in built.parameters())
