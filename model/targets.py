"""Which rows a model predicts and what: found before a step, so that the step need not wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED_LABEL = -100


class Targets(NamedTuple):
    """The labels that count.

    ::

        labels [2, 3]      -100  7 -100      rows    1 3 5
                              4 -100  9      tokens  7 4 9

    Attributes:
        rows: [T] int64 places in the [B * n] rows, in order.
        tokens: [T] int64, the true token of each.
    """

    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Targets:
        """From labels [B, n] int64, -100 where nothing is predicted.

        On a GPU this waits until the labels are there: how many count decides a shape.
        """
        flat = labels.flatten()
        (rows,) = torch.nonzero(flat != IGNORED_LABEL, as_tuple=True)
        return cls(rows, flat[rows])

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.rows.to(device), self.tokens.to(device))

    def pick(self, hidden: Float[Tensor, "b n e"]) -> Float[Tensor, "t e"]:
        """[B, n, E] -> [T, E], the rows that predict."""
        return hidden.flatten(0, 1).index_select(0, self.rows)


def as_targets(labels: Int[Tensor, "b n"] | Targets) -> Targets:
    """What a model's ``labels`` say, given either way."""
    return labels if isinstance(labels, Targets) else Targets.of(labels)
