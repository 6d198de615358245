"""CoNLL F1 of coreference: the mean of MUC, B-cubed and CEAF (Pradhan et al. 2012).

The official scorer is a Perl script. Of its copies in Python on the package index none is kept up
(scorch: 2020, metric4coref and coreference-eval: 2022-2023; ``coval`` there is something else), and
the three metrics are few lines; the test has the official scorer's own published cases.

    true      {a} {b c} {d e f}
    found     {a} {b c x} {d y} {z}

    MUC       links kept among those a cluster needs        recall 1/3 (b-c of b-c, d-e, e-f)
    B-cubed   for each mention the share of its cluster     recall (1 + 2 + 1/3) / 6
    CEAF      clusters matched one to one, the overlap of   recall (1 + 4/5 + 2/5) / 3
              a pair being 2 |common| / (sum of sizes)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Clusters = Sequence[Sequence[Hashable]]
METRICS = ("muc", "b_cubed", "ceaf")
_PARTS = ("recall", "num_true", "precision", "num_found")


def coref_counts(true: Clusters, found: Clusters) -> dict[str, float]:
    """What the scores of a document are made of; scores of several come from the sums.

    Args:
        true: The clusters that are right, each of mentions.
        found: Those of a model; a mention is in one of them at most.

    Returns:
        For each metric the numerators and denominators of recall and precision.
    """
    ours, theirs = [set(one) for one in true], [set(one) for one in found]
    common = np.array([[len(a & b) for b in theirs] for a in ours], np.float64)
    common = common.reshape(len(ours), len(theirs))
    sizes = np.array([len(a) for a in ours], np.float64)
    other_sizes = np.array([len(b) for b in theirs], np.float64)
    matched = _ceaf(common, sizes, other_sizes)
    values = (
        (*_muc(common, sizes), *_muc(common.T, other_sizes)),
        (*_b_cubed(common, sizes), *_b_cubed(common.T, other_sizes)),
        (matched, float(len(ours)), matched, float(len(theirs))),
    )
    return {
        f"{metric}_{part}": value
        for metric, four in zip(METRICS, values, strict=True)
        for part, value in zip(_PARTS, four, strict=True)
    }


def conll_scores(counts: Mapping[str, float]) -> dict[str, float]:
    """F1 of each metric and their mean, in percent.

    Args:
        counts: Of ``coref_counts``, summed over documents.
    """
    scores = {}
    for metric in METRICS:
        hits, num_true, right, num_found = (counts[f"{metric}_{part}"] for part in _PARTS)
        recall = hits / num_true if num_true else 0.0
        precision = right / num_found if num_found else 0.0
        total = recall + precision
        scores[f"{metric}_f1"] = 200.0 * recall * precision / total if total else 0.0
    return {"conll_f1": sum(scores.values()) / len(METRICS), **scores}


def summed_counts(documents: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The counts of several documents as one."""
    totals = {f"{metric}_{part}": 0.0 for metric in METRICS for part in _PARTS}
    for counts in documents:
        for name in totals:
            totals[name] += counts[name]
    return totals


def _muc(common: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[float, float]:
    """Links of clusters [a] that survive in others, by the sizes of what is common [a, b]."""
    # Each mention that the other side has in no cluster is a part of its own.
    parts = (common > 0).sum(1) + sizes - common.sum(1)
    return float((sizes - parts).sum()), float((sizes - 1).sum())


def _b_cubed(common: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[float, float]:
    return float((common**2 / sizes[:, None]).sum()), float(sizes.sum())


def _ceaf(
    common: NDArray[np.float64], sizes: NDArray[np.float64], other_sizes: NDArray[np.float64]
) -> float:
    if common.size == 0:
        return 0.0
    from scipy.optimize import linear_sum_assignment  # half a second that only this score needs

    overlap = 2.0 * common / (sizes[:, None] + other_sizes)  # phi 4 of Luo 2005
    return float(overlap[linear_sum_assignment(overlap, maximize=True)].sum())
