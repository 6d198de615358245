"""Which answer is chosen in a text, and among the texts of a question."""

import pytest
import torch

from haloformer.launcher.evaluate_questions import QuestionsEvaluator, best_span


def logits_of(starts, ends):
    return torch.tensor(list(zip(starts, ends, strict=True)), dtype=torch.float64)


def test_the_best_pair_ends_behind_its_start():
    #                  0  1  2  3  4
    logits = logits_of([0, 0, 1, 5, 0], [0, 4, 3, 0, 2])
    found = best_span(logits, 0, 5)
    assert (found.first, found.last) == (3, 4)  # not 3 to 1, which has the highest scores
    chances = torch.log_softmax(logits, 0)
    assert found.score == pytest.approx(float(chances[3, 0] + chances[4, 1]))


def test_the_question_and_the_last_separator_are_no_answers():
    logits = logits_of([9, 9, 0, 1, 0, 9], [9, 9, 0, 1, 0, 9])
    found = best_span(logits, 2, 5)
    assert (found.first, found.last) == (3, 3)
    # What stands outside still takes its share of the probability.
    assert found.score < -10
    assert best_span(logits, 5, 5) is None and best_span(logits, 7, 5) is None


def test_an_answer_has_thirty_tokens_at_most():
    starts, ends = torch.zeros(50), torch.zeros(50)
    starts[2], ends[31], ends[32] = 8, 4, 8
    found = best_span(torch.stack([starts, ends], 1), 0, 50)
    assert (found.first, found.last) == (2, 31)


def record(question, answer, score, answers=("Paris", "City of Paris"), **more):
    return {"id": question, "answers": list(answers), "answer": answer, "score": score, **more}


def test_the_most_probable_document_answers_a_question_of_triviaqa():
    records = [
        record("q1", "Lyon", -3.0, document="a"),
        record("q1", "Paris", -1.0, document="b"),
        record("q1", "Nice", -2.0, document="c"),
        record("q2", "the Ghent-city", -1.0, ["Ghent city"], document="a"),
        record("q3", "", None, ["Rome"], document="a"),  # its text did not fit
    ]
    outcome = QuestionsEvaluator().outcome(records, None)
    assert outcome.count == 3 and outcome.records == records
    assert outcome.scores["model"] == pytest.approx({"em": 200 / 3, "f1": 200 / 3})
    baseline = outcome.scores["most frequent answer"]
    assert baseline == pytest.approx({"em": 100 / 3, "f1": 100 / 3})


def test_questions_without_documents_have_hotpotqas_rules():
    records = [record("q1", "Jean-Paul", -1.0, ["Jean Paul"]), record("q2", "yes", -1.0, ["yes"])]
    scores = QuestionsEvaluator().outcome(records, None).scores["model"]
    assert scores == pytest.approx({"em": 50, "f1": 50})
