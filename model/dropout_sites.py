"""Where a model drops elements, and the key that each place has in one step of a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from haloformer.kernels.dropout import fold_key


class Site(IntEnum):
    """Dropout places of a layer; the embeddings count as layer 0, the first layer as 1."""

    EMBEDDINGS = 0
    BAND_ATTENTION = 1
    GLOBAL_ATTENTION = 2
    ATTENTION_OUTPUT = 3
    FFN_OUTPUT = 4
    FFN_INNER = 5
    SELF_ATTENTION = 6
    CROSS_ATTENTION = 7
    CROSS_OUTPUT = 8
    HEAD_INPUT = 9
    HEAD_INNER = 10


@dataclass(frozen=True)
class DropoutStep:
    """One optimizer step of a run, as far as dropout is concerned.

    With the example's place in the global batch and the element's position this names every
    dropped element of a run, so that any layout of ranks drops the same ones.

    Attributes:
        seed: Seed of the run.
        step: Optimizer step.
    """

    seed: int
    step: int

    def key(self, layer: int, site: Site) -> int:
        """Unsigned 32-bit key of one site."""
        return fold_key(self.seed, self.step, layer, int(site))
