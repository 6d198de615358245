"""Models of annotated examples on held-out ones: labels, chosen candidates, coreference.

Each stands beside what one gets without a model, from the held-out data itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from typing import Any, ClassVar

from torch import nn

from haloformer.data_pipeline.example_stream import ExampleEvalStream
from haloformer.data_pipeline.examples import ExampleBatch, ExampleKey
from haloformer.data_pipeline.index import ShardIndex
from haloformer.launcher.coref_scores import conll_scores, coref_counts, summed_counts
from haloformer.launcher.evaluators import Evaluator, Json, Outcome, Work, dealt, gathered
from haloformer.launcher.label_scores import accuracy, mean_f1
from haloformer.model.coreference import predicted_clusters

Record = dict[str, Json]


class ExampleEvaluator(Evaluator):
    """Asks a model about one example after the other; they are dealt to the data ranks."""

    unit: ClassVar[str] = "examples"
    decimals: ClassVar[int] = 2

    def evaluate(self, model: nn.Module, work: Work) -> Outcome:
        """Score every example, or the first ``limit``."""
        stream = work.open_stream()
        assert isinstance(stream, ExampleEvalStream)
        records: list[Record] = []
        for number, batch, inputs in dealt(stream, self.unit, work):
            output = model(*inputs, None)
            if work.counts:
                found = self.record(stream, batch.keys[0], batch, output)
                records.append({"number": number, **found})
        answered = gathered(records, work)
        if not answered:
            raise ValueError(f"{stream.index.folder}: there is no example that can be read")
        return self.outcome(answered, stream.index)

    @abstractmethod
    def record(
        self, stream: ExampleEvalStream, key: ExampleKey, batch: ExampleBatch, output: Any
    ) -> Record:
        """What is kept of one example: what is true and what the model says.

        Args:
            stream: Where it is from.
            key: Which one it is.
            batch: The example alone.
            output: Of the model.
        """

    @abstractmethod
    def outcome(self, records: list[Record], index: ShardIndex) -> Outcome:
        """The scores of all examples, at least one."""


class ClassificationEvaluator(ExampleEvaluator):
    """Accuracy, and F1: of the second class if there are two, else the mean of all."""

    unit: ClassVar[str] = "documents"

    def record(
        self, stream: ExampleEvalStream, key: ExampleKey, batch: ExampleBatch, output: Any
    ) -> Record:
        """The names of both classes."""
        known, names = stream.annotation(key), stream.index.labels
        answer = names[int(output.logits[0].argmax())]
        return {"id": known["id"], "label": known["label"], "answer": answer}

    def outcome(self, records: list[Record], index: ShardIndex) -> Outcome:
        """Beside it, the class that most documents have."""
        numbers = {name: number for number, name in enumerate(index.labels)}
        labels = [numbers[one["label"]] for one in records]
        (most, _), *_ = Counter(labels).most_common(1)
        candidates = {
            "model": [numbers[one["answer"]] for one in records],
            "most frequent class": [most] * len(labels),
        }
        scores = {
            name: {
                "accuracy": accuracy(answers, labels),
                "f1": mean_f1(answers, labels, len(numbers)),
            }
            for name, answers in candidates.items()
        }
        note = f"the most frequent class is {index.labels[most]!r}"
        return Outcome(len(records), scores, records, notes=[note])


class ChoicesEvaluator(ExampleEvaluator):
    """Accuracy over all questions, also those whose candidate the recipe cut off."""

    unit: ClassVar[str] = "questions"

    def record(
        self, stream: ExampleEvalStream, key: ExampleKey, batch: ExampleBatch, output: Any
    ) -> Record:
        """The numbers of both candidates."""
        known = stream.annotation(key)
        answer = int(output.logits[0].argmax())
        return {"id": known["id"], "label": known["label"], "answer": answer}

    def outcome(self, records: list[Record], index: ShardIndex) -> Outcome:
        """Beside it, the candidate that stands first."""
        labels = [one["label"] for one in records]
        answers = [one["answer"] for one in records]
        scores = {
            "model": {"accuracy": accuracy(answers, labels)},
            "first candidate": {"accuracy": accuracy([0] * len(labels), labels)},
        }
        return Outcome(len(records), scores, records)


class CoreferenceEvaluator(ExampleEvaluator):
    """CoNLL F1 of the clusters of whole documents; a mention is its first and last token."""

    unit: ClassVar[str] = "documents"

    def record(
        self, stream: ExampleEvalStream, key: ExampleKey, batch: ExampleBatch, output: Any
    ) -> Record:
        """Both clusterings, and the one by equal texts."""
        known, ids = stream.annotation(key), stream.token_ids(key).tolist()
        (clusters,) = predicted_clusters(output)
        by_text: dict[tuple[int, ...], list[list[int]]] = {}
        for first, last in (mention for cluster in known["clusters"] for mention in cluster):
            by_text.setdefault(tuple(ids[first : last + 1]), []).append([first, last])
        return {
            "id": known["id"],
            "clusters": known["clusters"],
            "answer": [[list(mention) for mention in cluster] for cluster in clusters],
            "same_text": [cluster for cluster in by_text.values() if len(cluster) > 1],
        }

    def outcome(self, records: list[Record], index: ShardIndex) -> Outcome:
        """Beside it, true mentions with the same tokens as one: it need not find mentions."""
        candidates = {"model": "answer", "true mentions of the same text": "same_text"}
        scores = {
            name: conll_scores(
                summed_counts(
                    coref_counts(_mentions(one["clusters"]), _mentions(one[key])) for one in records
                )
            )
            for name, key in candidates.items()
        }
        return Outcome(len(records), scores, records)


def _mentions(clusters: list[list[list[int]]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(mention) for mention in cluster] for cluster in clusters]
