"""What a sliding window is: per-head reach to either side, and its dilation.

Configs and papers speak of the two-sided window w (w/2 keys on either side, Longformer section
3.1); everything in ``kernels`` uses one-sided inclusive ``left`` and ``right``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WindowSpec:
    """Which keys a row of each head may attend.

    Row i of head h attends key j when ``-left[h]*d <= j-i <= right[h]*d`` and ``(j-i) % d == 0``
    with ``d = dilation[h]``. Windows truncate at the ends of the sequence; they never shift.

    ::

        N=6, left=1, right=1            d=1            d=2
                                    1 1 . . . .    1 . 1 . . .
                                    1 1 1 . . .    . 1 . 1 . .
                                    . 1 1 1 . .    1 . 1 . 1 .
                                    . . 1 1 1 .    . 1 . 1 . 1
                                    . . . 1 1 1    . . 1 . 1 .
                                    . . . . 1 1    . . . 1 . 1

    Attributes:
        left: Keys to the left per head, in steps of the dilation.
        right: Keys to the right per head; 0 is causal.
        dilation: Distance between two attended keys per head, at least 1.

    Raises:
        ValueError: If the lengths differ, no head is given, or a number is out of range.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    dilation: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = (len(self.left), len(self.right), len(self.dilation))
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(
                f"left, right and dilation have {lengths} entries; give one per head to each"
            )
        for name, values, low in (
            ("left", self.left, 0),
            ("right", self.right, 0),
            ("dilation", self.dilation, 1),
        ):
            for head, value in enumerate(values):
                if value < low:
                    raise ValueError(f"{name}[{head}] is {value}; it must be at least {low}")

    @classmethod
    def from_two_sided(
        cls, window: int, num_heads: int, *, dilation: int | Sequence[int] = 1, causal: bool = False
    ) -> WindowSpec:
        """Build the spec of a layer from the two-sided window that papers and configs use.

        Args:
            window: Two-sided window w, even: w/2 keys on either side (causal: w/2 to the left).
            num_heads: Number of heads.
            dilation: One dilation for all heads, or one per head.
            causal: Attend to the left only.

        Raises:
            ValueError: If the window is odd or below 2, or the dilations do not match the heads.
        """
        if window < 2 or window % 2:
            raise ValueError(
                f"window {window} is not an even number of at least 2; it counts both sides"
            )
        per_head = (dilation,) * num_heads if isinstance(dilation, int) else tuple(dilation)
        if len(per_head) != num_heads:
            raise ValueError(f"{len(per_head)} dilations for {num_heads} heads; give one per head")
        half = window // 2
        return cls((half,) * num_heads, (0 if causal else half,) * num_heads, per_head)

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return len(self.left)

    @property
    def reach_left(self) -> int:
        """Rows to the left that the widest head needs: max(left * dilation)."""
        return max(x * d for x, d in zip(self.left, self.dilation, strict=True))

    @property
    def reach_right(self) -> int:
        """Rows to the right that the widest head needs: max(right * dilation)."""
        return max(x * d for x, d in zip(self.right, self.dilation, strict=True))

    def select(self, heads: Sequence[int]) -> WindowSpec:
        """The spec of some of the heads, in the order given."""
        return WindowSpec(
            tuple(self.left[h] for h in heads),
            tuple(self.right[h] for h in heads),
            tuple(self.dilation[h] for h in heads),
        )

    def groups_by_reach(self) -> list[tuple[int, ...]]:
        """Heads that need the same halo, first appearance first: they share one exchange."""
        groups: dict[tuple[int, int], list[int]] = {}
        for h, (left, right, d) in enumerate(
            zip(self.left, self.right, self.dilation, strict=True)
        ):
            groups.setdefault((left * d, right * d), []).append(h)
        return [tuple(heads) for heads in groups.values()]

    def groups_by_window(self) -> list[tuple[int, ...]]:
        """Heads with one and the same window and dilation, first appearance first."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for h, window in enumerate(zip(self.left, self.right, self.dilation, strict=True)):
            groups.setdefault(window, []).append(h)
        return [tuple(heads) for heads in groups.values()]
