"""Every layout is trained once per session; engine and fragment tests look at the same runs."""

import pytest

from dist import run_ranks
from layouts import BF16, ELASTIC, FP32, walk


@pytest.fixture(scope="session")
def walked(tmp_path_factory):
    """(what every layout saw, the folder with one checkpoint per case)."""
    folder = tmp_path_factory.mktemp("walked")
    seen = {"trained": {}, "resumed": {}, "elastic": {}, "said": "", "copies": {}}
    for world in (4, 2, 1):  # the larger worlds write what the smaller ones read
        cases = [case for case in FP32 + BF16 if case.world == world]
        elastic = [pair for pair in ELASTIC if pair[1].world == world]
        ranks = run_ranks(world, walk, cases, elastic, str(folder), timeout=300.0)
        assert all(rank[0] == ranks[0][0] for rank in ranks), "ranks disagree"
        for kind, histories in ranks[0][0].items():
            seen[kind] |= histories
        for case in ranks[0][3]:
            seen["copies"][case] = [rank[3][case] for rank in ranks]
        if world == 4:
            seen["places"] = [rank[1] for rank in ranks]
        seen["said"] += "".join(rank[2] for rank in ranks)
    return seen, folder
