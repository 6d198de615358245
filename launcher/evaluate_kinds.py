"""The evaluator of each kind of model."""

from __future__ import annotations

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.evaluate_char_lm import CharLmEvaluator
from haloformer.launcher.evaluate_examples import (
    ChoicesEvaluator,
    ClassificationEvaluator,
    CoreferenceEvaluator,
)
from haloformer.launcher.evaluate_led import LedEvaluator
from haloformer.launcher.evaluate_mlm import MaskedLmEvaluator
from haloformer.launcher.evaluate_questions import QuestionsEvaluator
from haloformer.launcher.evaluators import Evaluator

_EVALUATORS: dict[str, Evaluator] = {
    "longformer_mlm": MaskedLmEvaluator(),
    "longformer_classifier": ClassificationEvaluator(),
    "longformer_qa": QuestionsEvaluator(),
    "longformer_choice": ChoicesEvaluator(),
    "longformer_coref": CoreferenceEvaluator(),
    "led": LedEvaluator(),
    "char_lm": CharLmEvaluator(),
}


def evaluator_of(config: TrainConfig) -> Evaluator:
    """The evaluator of a recipe."""
    return _EVALUATORS[config.model.kind]
