"""Strands and their blocks hold every score of the window, and every row exactly once."""

import pytest

from cases import BAND_CASES, random_band_case
from haloformer.kernels.strands import strands

CASES = [*BAND_CASES, *(random_band_case(seed) for seed in range(40))]


@pytest.mark.parametrize("size", [4, 64])
def test_blocks_cover_rows_once_and_all_keys_of_their_windows(size):
    for case in CASES:
        band = case.band()
        spec, m = band.spec, case.n + sum(case.halo)
        rows_seen = {}
        for strand in strands(spec, case.n, m, band.offset, band.valid):
            for rows, keys in strand.blocks(size):
                assert len(rows) <= size
                key_rows = {strand.key_rows[u] for u in keys}
                assert all(band.valid[0] <= j < band.valid[1] for j in key_rows)
                for i in (strand.query_rows[t] for t in rows):
                    for head in range(*strand.heads.indices(spec.num_heads)):
                        assert (head, i) not in rows_seen
                        rows_seen[head, i] = True
                        d, center = spec.dilation[head], i + band.offset
                        window = range(
                            center - spec.left[head] * d, center + spec.right[head] * d + 1, d
                        )
                        assert key_rows >= {j for j in window if j in range(*band.valid)}
        assert len(rows_seen) == case.n * spec.num_heads


def test_a_block_has_few_keys_beyond_its_windows():
    """Work is linear: a block of R rows computes at most R - 1 keys more than a window has."""
    for case in CASES:
        band = case.band()
        for strand in strands(band.spec, case.n, case.n + sum(case.halo), band.offset, band.valid):
            for rows, keys in strand.blocks(8):
                assert len(keys) <= strand.left + strand.right + len(rows)
