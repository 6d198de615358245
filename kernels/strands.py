"""Cut a band into dense pieces: runs of equal heads, residue classes of a dilation, blocks of rows.

A window of dilation d touches only rows of one residue modulo d, so each residue class is an
ordinary dense band on every d-th row, a strided view of the same memory::

    N=6, d=2, left=right=1          class 0: rows 0 2 4      class 1: rows 1 3 5
    row 2 attends 0, 2, 4    ->     as 1 attends 0, 1, 2     as a dense window
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from haloformer.kernels.spec import WindowSpec


@dataclass(frozen=True)
class Strand:
    """One dense band: consecutive heads of one window, and the rows of one residue class.

    Strand row t is query row ``query_rows[t]``, strand key u is buffer row ``key_rows[u]``, and
    row t stands on key t + offset.

    Attributes:
        heads: Slice of the head dimension.
        query_rows: Query rows of the class.
        key_rows: Buffer rows of the class.
        offset: Strand key on which strand row 0 stands.
        low: First strand key that exists.
        high: End of the strand keys that exist.
        left: Keys to the left of a row, inclusive.
        right: Keys to the right of a row, inclusive.
    """

    heads: slice
    query_rows: range
    key_rows: range
    offset: int
    low: int
    high: int
    left: int
    right: int

    def blocks(self, size: int) -> Iterator[tuple[range, range]]:
        """Blocks of strand rows, each with the strand keys that any row of it may attend."""
        for start in range(0, len(self.query_rows), size):
            stop = min(start + size, len(self.query_rows))
            first = max(self.low, start + self.offset - self.left)
            end = min(self.high, stop + self.offset + self.right)
            yield range(start, stop), range(first, max(first, end))


def strands(spec: WindowSpec, n: int, m: int, offset: int, valid: tuple[int, int]) -> list[Strand]:
    """All strands of a band of n query rows over a buffer of m keys."""
    found = []
    for group in spec.groups_by_window():
        d = spec.dilation[group[0]]
        for heads in _runs(group):
            for residue in range(min(d, n)):
                shift, key_residue = divmod(residue + offset, d)
                found.append(
                    Strand(
                        heads=heads,
                        query_rows=range(residue, n, d),
                        key_rows=range(key_residue, m, d),
                        offset=shift,
                        # -(-a // d) rounds up: the first strand key at or after a buffer row.
                        low=max(0, -(-(valid[0] - key_residue) // d)),
                        high=max(0, -(-(valid[1] - key_residue) // d)),
                        left=spec.left[group[0]],
                        right=spec.right[group[0]],
                    )
                )
    return found


def _runs(heads: tuple[int, ...]) -> Iterator[slice]:
    """Slices of consecutive numbers: a slice of heads is a view, a list of heads is a copy."""
    start = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            yield slice(heads[start], heads[i - 1] + 1)
            start = i
