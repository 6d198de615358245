"""Answers that a model finds in texts, by exact match and F1."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from haloformer.data_pipeline.example_stream import ExampleEvalStream
from haloformer.data_pipeline.examples import ExampleBatch, ExampleKey
from haloformer.data_pipeline.index import ShardIndex
from haloformer.launcher.answer_scores import Rules, exact_match, word_f1
from haloformer.launcher.evaluate_examples import ExampleEvaluator, Record
from haloformer.launcher.evaluators import Outcome

MAX_ANSWER_TOKENS = 30  # as in the scripts of SQuAD and TriviaQA


class QuestionsEvaluator(ExampleEvaluator):
    """Exact match and F1 over questions, as the scripts of HotpotQA and TriviaQA count them.

    A question of TriviaQA has several documents. The answer that is most probable in its own
    document counts::

        document 1   "Paris"   log p -0.9          document 2   "Lyon"   log p -3.1
        answer       Paris
    """

    unit: ClassVar[str] = "questions"

    def record(
        self, stream: ExampleEvalStream, key: ExampleKey, batch: ExampleBatch, output: Any
    ) -> Record:
        """The best answer in this text, and its logarithmic probability."""
        known, eos = stream.annotation(key), stream.tokenizer.specials.eos
        length = int(batch.attention_mask[0].sum())
        first_separator = int((batch.input_ids[0] == eos).argmax())
        # <s> question </s> </s> text </s>; a question that fills the row leaves no text.
        logits = output.logits[0, :length].double()
        found = best_span(logits, first_separator + 2, length - 1)
        answer = "" if found is None else stream.span_text(key, found.first, found.last)
        return {**known, "answer": answer, "score": None if found is None else found.score}

    def outcome(self, records: list[Record], index: ShardIndex) -> Outcome:
        """Beside it, the answer that is right most often."""
        questions: dict[str, Record] = {}
        for one in records:
            best = questions.get(one["id"])
            if best is None or _score(one) > _score(best):
                questions[one["id"]] = one
        chosen = list(questions.values())
        counted = Counter(one["answers"][0] for one in chosen if one["answers"])
        common = counted.most_common(1)[0][0] if counted else ""
        scores = {
            "model": _mean_scores(chosen, None),
            "most frequent answer": _mean_scores(chosen, common),
        }
        note = f"the most frequent answer is {common!r}"
        return Outcome(len(chosen), scores, records, notes=[note])


class FoundSpan(NamedTuple):
    """An answer: its tokens in the row and its logarithmic probability."""

    first: int
    last: int
    score: float


def best_span(logits: Float[Tensor, "n 2"], start: int, stop: int) -> FoundSpan | None:
    """The most probable answer of at most ``MAX_ANSWER_TOKENS`` tokens.

    Start and end are independent, so a pair has the product of their probabilities; of equal ones
    the shorter, then the earlier.

    Args:
        logits: [n, 2] start and end scores of the tokens of a row, padding left out.
        start: Where answers may begin.
        stop: One past the last token that an answer may hold.

    Returns:
        None if there is no token between ``start`` and ``stop``.
    """
    chances = torch.log_softmax(logits, 0)[start:stop]
    best = None
    for more in range(min(MAX_ANSWER_TOKENS, len(chances))):
        pairs = chances[: len(chances) - more, 0] + chances[more:, 1]
        score, place = pairs.max(0)
        if best is None or score.item() > best.score:
            first = start + int(place)
            best = FoundSpan(first, first + more, score.item())
    return best


def _score(record: Record) -> float:
    return -float("inf") if record["score"] is None else float(record["score"])


def _mean_scores(records: list[Record], answer: str | None) -> dict[str, float]:
    """Percent over questions, of the model's answers or of one that is given to all."""
    pairs = [(one["answer"] if answer is None else answer, one) for one in records]
    return {
        "em": 100.0 * fmean(exact_match(said, one["answers"], _rules(one)) for said, one in pairs),
        "f1": 100.0 * fmean(word_f1(said, one["answers"], _rules(one)) for said, one in pairs),
    }


def _rules(record: Record) -> Rules:
    """Only TriviaQA names the document of an example."""
    return "triviaqa" if "document" in record else "hotpotqa"
