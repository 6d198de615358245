"""Which states of a char LM have to be computed when a window moves on: integers only.

A window of ``length`` rows moves on by ``stride``; what it sees for the first time is scored
(Longformer section 4.2.2). Length 6, stride 2::

    row         0 1 2 3 4 5 6 7 8 9
    window 0    s s s s s s                 the first window scores all its rows
    window 1        . . . . s s
    window 2            . . . . s s

Attention is causal and layer l looks r_l rows back, so after l layers a row depends on
R_l = r_1 + ... + r_l rows before it. In a window that starts at row s the states after layer l of
rows from s + R_l on are those of any longer context: the window before has left them in the cache.
And of the rows before those that are scored, layer l only needs the last r_{l+1} + ... + r_L.

Length 8, stride 2, three layers that look 2, 1 and 4 rows back; the window starts at s, its last
two rows are scored::

    row          s 1 2 3 4 5 6 7
    embedding    = = = = = = n n        n  new: computed once, and scored at the top
    layer 1      . d = = = = n n        =  clean: as the window before has left it
    layer 2      . . d = = = n n        d  dirty: it depends on where the window starts
    layer 3      . . . . . . n n        .  nobody needs it

With R_L <= length - stride there is nothing dirty, and every state is computed once, whatever the
stride; then the rows of many windows are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Windows:
    """Overlapping windows over a stream.

    Attributes:
        num_rows: Rows of the stream.
        length: Rows of a window; the last window ends with the stream and is as long as others.
        stride: Rows by which it moves on, at most its length.

    Raises:
        ValueError: If there is no row, or the window would pass over rows.
    """

    num_rows: int
    length: int
    stride: int

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError("the stream has no row")
        if not 1 <= self.stride <= self.length:
            raise ValueError(
                f"a window of length {self.length} that moves on by stride {self.stride} passes "
                "over rows; take a stride from 1 to the length"
            )

    @property
    def count(self) -> int:
        """How many windows there are; one, if it is longer than the stream."""
        return 1 + -(-max(self.num_rows - self.length, 0) // self.stride)

    def end(self, window: int) -> int:
        """Behind the last row of a window."""
        return min(self.length + window * self.stride, self.num_rows)

    def start(self, window: int) -> int:
        """First row of a window."""
        return max(self.end(window) - self.length, 0)

    def first_scored(self, window: int) -> int:
        """First row that a window scores."""
        return 0 if window == 0 else self.end(window - 1)

    def num_visited(self, windows: range) -> int:
        """Rows of some windows, each counted as often as a window holds it."""
        return sum(self.end(window) - self.start(window) for window in windows)


@dataclass(frozen=True)
class Turn:
    """One pass through the layers.

    Attributes:
        start: First row that is seen.
        first: First of the new rows.
        end: Behind the last new row.
        floors: Per layer, 0 is the embedding: new rows before it are left out.
        dirty: Per layer: rows before ``first`` that are computed again; those of the embedding
            never are.
    """

    start: int
    first: int
    end: int
    floors: tuple[int, ...]
    dirty: tuple[range, ...]

    def new_rows(self, layer: int) -> range:
        """New rows that a layer computes."""
        return range(min(max(self.first, self.floors[layer]), self.end), self.end)

    @property
    def num_scored(self) -> int:
        """Rows whose state after the last layer is asked for."""
        return len(self.new_rows(len(self.floors) - 1))

    @property
    def num_computed(self) -> int:
        """Rows times layers."""
        layers = range(1, len(self.floors))
        return sum(len(self.new_rows(layer)) + len(self.dirty[layer]) for layer in layers)


class StreamingPlan:
    """The turns of any stretch of windows.

    Args:
        windows: Over the stream.
        reaches: Rows that each layer looks back, r_1 .. r_L.
        block_rows: Most new rows of a turn, for memory; it changes no result.
    """

    def __init__(self, windows: Windows, reaches: Sequence[int], block_rows: int) -> None:
        assert reaches and block_rows >= 1
        self.windows, self.reaches, self._block_rows = windows, tuple(reaches), block_rows
        self._depths = (0, *accumulate(reaches))  # R_0 .. R_L

    @property
    def computes_once(self) -> bool:
        """Whether no state is ever computed again."""
        windows = self.windows
        return windows.count == 1 or self._depths[-1] <= windows.length - windows.stride

    def turns(self, stretch: range) -> Iterator[Turn]:
        """What to compute, in order, to score the rows of some windows that follow each other.

        The first window of a stretch is computed from its own start, so it does not matter which
        windows came before: stretches can be anybody's.
        """
        if not stretch:
            return
        windows = self.windows
        window = stretch[0]
        start, end = windows.start(window), windows.end(window)
        floors = self._floors(start, windows.first_scored(window))
        yield from self._blocks(start, floors[0], end, floors, self._nothing)
        if self.computes_once:
            first, end = end, windows.end(stretch[-1])
            yield from self._blocks(start, first, end, self._all(first), self._nothing)
            return
        for window in stretch[1:]:
            start, first = windows.start(window), windows.first_scored(window)
            dirty = tuple(
                range(low, max(low, min(start + depth, first)))
                for low, depth in zip(self._floors(start, first), self._depths, strict=True)
            )
            yield from self._blocks(start, first, windows.end(window), self._all(first), dirty)

    def kept_keys(self, layer: int) -> int:
        """Rows before the next new one whose keys and values layer 1 .. L goes on to need."""
        if self.computes_once:
            return self.reaches[layer - 1]
        return self._depths[-1] - self._depths[layer - 1]

    def kept_states(self, layer: int) -> int:
        """Rows before the next new one whose states after layer 0 .. L - 1 may become dirty."""
        return 0 if self.computes_once else self._depths[-1] - self._depths[layer + 1]

    def _floors(self, start: int, first: int) -> tuple[int, ...]:
        """Per layer: the first row that the rows from ``first`` on depend on."""
        return tuple(max(start, first - (self._depths[-1] - depth)) for depth in self._depths)

    def _all(self, first: int) -> tuple[int, ...]:
        return (first,) * len(self._depths)

    @property
    def _nothing(self) -> tuple[range, ...]:
        return (range(0),) * len(self._depths)

    def _blocks(
        self, start: int, first: int, end: int, floors: tuple[int, ...], dirty: tuple[range, ...]
    ) -> Iterator[Turn]:
        """Turns of new rows ``first`` .. ``end`` - 1; what is dirty comes with the first."""
        for begin in range(first, end, self._block_rows):
            stop = min(begin + self._block_rows, end)
            yield Turn(start, begin, stop, floors, dirty if begin == first else self._nothing)
