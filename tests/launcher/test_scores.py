"""Scores against the official scripts' own cases and against numbers made by hand."""

import pytest

from haloformer.launcher.answer_scores import exact_match, normalized, word_f1
from haloformer.launcher.coref_scores import METRICS, conll_scores, coref_counts, summed_counts
from haloformer.launcher.label_scores import accuracy, mean_f1

KEY = "a bc def"
# Response, then recall and precision of MUC, B-cubed and CEAF-phi4, from TestCases.README and
# CorefMetricTestConfig.pm of the official scorer v8.01 (which give no CEAF for the last two).
OFFICIAL = {
    "a bc def": [(1, 1), (1, 1), (1, 1)],
    "a de": [(1 / 3, 1), (7 / 18, 1), (0.6, 0.9)],
    "a bcx defy z": [(1, 3 / 5), (1, (4 + 7 / 12) / 9), (0.88571, 0.66429)],
    "a bcx dy z": [(1 / 3, 1 / 3), (5 / 9, 17 / 42), (0.73333, 0.55)],
    "a bcxB dy z": [(1 / 3, 1 / 4), (5 / 9, 5 / 16), (0.68889, 0.51667)],
    "a bcx dy Bz": [(1 / 3, 1 / 4), (5 / 9, 17 / 48), (0.73333, 0.55)],
    "a b c d e f": [(0, 0), (1 / 2, 1), None],
    "abcdef": [(1, 3 / 5), (1, (1 / 6 + 2 * 2 / 6 + 3 * 3 / 6) / 6), None],
}


def counts_of(key, response):
    return coref_counts(key.split(), response.split())


def recall_and_precision(counts, metric):
    found = counts[f"{metric}_num_found"]
    precision = counts[f"{metric}_precision"] / found if found else 0.0
    return counts[f"{metric}_recall"] / counts[f"{metric}_num_true"], precision


@pytest.mark.parametrize("response", OFFICIAL)
def test_coreference_has_the_scores_of_the_official_scorer(response):
    counts = counts_of(KEY, response)
    for metric, expected in zip(METRICS, OFFICIAL[response], strict=True):
        if expected is not None:
            assert recall_and_precision(counts, metric) == pytest.approx(expected, abs=1e-5)


def test_conll_f1_is_the_mean_of_three():
    scores = conll_scores(counts_of(KEY, "a de"))
    assert scores["muc_f1"] == pytest.approx(50)
    assert scores["b_cubed_f1"] == pytest.approx(56)  # 14/25
    assert scores["ceaf_f1"] == pytest.approx(72)
    assert scores["conll_f1"] == pytest.approx((50 + 56 + 72) / 3)


def test_documents_are_added_before_they_are_divided():
    both = summed_counts([counts_of(KEY, "a de"), counts_of("gh", "gh")])
    # MUC: 1 of 3 links and 1 of 1; none too many.
    assert conll_scores(both)["muc_f1"] == pytest.approx(200 * (1 / 2) / (1 + 1 / 2))
    assert both["b_cubed_recall"] == pytest.approx(7 / 3 + 2) and both["ceaf_num_true"] == 4


def test_nothing_found_and_nothing_true_are_zero_not_an_error():
    assert conll_scores(counts_of(KEY, ""))["conll_f1"] == 0
    assert conll_scores(counts_of("", "ab"))["conll_f1"] == 0
    assert conll_scores(summed_counts([]))["conll_f1"] == 0


def test_answers_are_normalized_as_the_official_scripts_do():
    assert normalized("The  St. John's, a band!", "hotpotqa") == "st johns band"
    assert normalized("The  St. John\u2019s_choir", "triviaqa") == "st john s choir"
    assert normalized("Theatre", "triviaqa") == "theatre"  # an article is a word


@pytest.mark.parametrize(
    ("answer", "true", "match", "f1"),
    [
        ("the Beatles", ["Beatles!"], 1, 1),
        ("Paul McCartney", ["John", "Sir Paul McCartney"], 0, 2 * 2 / 5),
        ("Paul Paul", ["Paul"], 0, 2 / 3),  # words count as often as they are there
        ("", ["Beatles"], 0, 0),
        ("Ringo", [], 0, 0),
        ("Yes.", ["yes"], 1, 1),
    ],
)
@pytest.mark.parametrize("rules", ["hotpotqa", "triviaqa"])
def test_exact_match_and_f1_take_the_best_of_the_true_answers(answer, true, match, f1, rules):
    assert exact_match(answer, true, rules) == match
    assert word_f1(answer, true, rules) == pytest.approx(f1)


def test_the_rules_of_the_data_sets_differ():
    assert exact_match("Jean-Paul", ["Jean Paul"], "triviaqa") == 1
    assert exact_match("Jean-Paul", ["Jean Paul"], "hotpotqa") == 0
    assert word_f1("no", ["no doubt"], "triviaqa") == pytest.approx(2 / 3)
    assert word_f1("no", ["no doubt"], "hotpotqa") == 0


def test_f1_of_two_labels_is_that_of_the_second():
    answers, labels = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert accuracy(answers, labels) == pytest.approx(60)
    assert mean_f1(answers, labels, 2) == pytest.approx(200 * 2 / 6)
    assert mean_f1([0, 0], [0, 0], 2) == 0


def test_f1_of_three_labels_is_their_mean():
    answers, labels = [0, 1, 2, 2], [0, 1, 1, 2]
    assert mean_f1(answers, labels, 3) == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)
