"""Tasks on annotated examples: classification, questions, multiple choice, coreference.

What the loss of a global batch is a mean over, and so what ``loss`` counts:

    classification   nats per document that has a label
    questions        nats per example that holds an answer, the mean of its start and its end
    choices          nats per example whose right candidate is there
    coreference      nats per document, summed over its kept spans (Lee et al. 2018)
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from haloformer.configs.models import (
    ChoicesConfig,
    ClassifierConfig,
    CorefConfig,
    QuestionsConfig,
)
from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.example_stream import (
    ChoicesEvalStream,
    ChoicesTrainStream,
    ClassificationEvalStream,
    ClassificationTrainStream,
    CoreferenceEvalStream,
    CoreferenceTrainStream,
    QuestionsEvalStream,
    QuestionsTrainStream,
)
from haloformer.data_pipeline.examples import ExampleBatch
from haloformer.launcher.feeding import (
    ChoiceInput,
    ExampleInput,
    choice_micro_batches,
    example_micro_batches,
)
from haloformer.launcher.task_base import Task
from haloformer.launcher.topology import Topology
from haloformer.model.classification import LongformerForSequenceClassification
from haloformer.model.coreference import LongformerForCoreference
from haloformer.model.multiple_choice import LongformerForMultipleChoice
from haloformer.model.question_answering import LongformerForQuestionAnswering


class ExampleTask(Task):
    """A task on annotated examples; they differ in their globals, so no FLOPs are told."""

    def micro_batches(
        self, batch: ExampleBatch, micro_batch: int, topology: Topology
    ) -> Iterator[ExampleInput | ChoiceInput]:
        """This rank's rows, and the labels of whole sequences."""
        return example_micro_batches(batch, micro_batch, topology)

    def counts(self, batch: ExampleBatch) -> dict[str, int]:
        """Examples that were longer than the recipe allows and lost their ends."""
        return {"cut_examples": int(batch.was_cut.sum())}


class ClassificationTask(ExampleTask):
    """One label per document."""

    train_stream, held_out_stream = ClassificationTrainStream, ClassificationEvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """Encoder and a head of as many classes as the data has."""
        assert isinstance(config.model, ClassifierConfig) and num_labels > 0
        return LongformerForSequenceClassification(
            config.model, vocab_size, num_labels, topology.tensor_group
        )


class QuestionsTask(ExampleTask):
    """The answer to a question, somewhere in the text."""

    train_stream, held_out_stream = QuestionsTrainStream, QuestionsEvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """Encoder and span head."""
        assert isinstance(config.model, QuestionsConfig)
        return LongformerForQuestionAnswering(config.model, vocab_size, topology.tensor_group)

    def num_targets(self, batch: ExampleBatch) -> int:
        """Examples that hold an answer: the loss of the others is zero."""
        return int((batch.labels[..., 0] >= 0).any(axis=1).sum())


class ChoicesTask(ExampleTask):
    """One of the candidates that stand in the text."""

    train_stream, held_out_stream = ChoicesTrainStream, ChoicesEvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """Encoder and a score per candidate."""
        assert isinstance(config.model, ChoicesConfig)
        return LongformerForMultipleChoice(config.model, vocab_size, topology.tensor_group)

    def micro_batches(
        self, batch: ExampleBatch, micro_batch: int, topology: Topology
    ) -> Iterator[ExampleInput | ChoiceInput]:
        """As of the others, with the places of the candidates."""
        return choice_micro_batches(batch, micro_batch, topology)


class CoreferenceTask(ExampleTask):
    """Which spans of a document name the same thing."""

    train_stream, held_out_stream = CoreferenceTrainStream, CoreferenceEvalStream

    def build_model(
        self, config: TrainConfig, vocab_size: int, topology: Topology, num_labels: int = 0
    ) -> nn.Module:
        """Encoder, mention scores and antecedent scores."""
        assert isinstance(config.model, CorefConfig)
        return LongformerForCoreference(config.model, vocab_size, topology.tensor_group)

    def num_targets(self, batch: ExampleBatch) -> int:
        """Documents, also those without a cluster: that nothing corefers is learned as well."""
        return batch.num_examples
