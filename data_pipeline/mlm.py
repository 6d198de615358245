"""Masking for masked-language modelling, a pure function of where a sequence stands in the run.

15 % of the text tokens become targets; of these 80 % read <mask>, 10 % a random token, 10 % stay
(BERT, RoBERTa). The bits come from Philox, whose counter is set to (epoch, stream, sequence), so
any rank computes the same mask for the same sequence, in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.tokenizers import Specials

IGNORED = -100  # the label of a position that is no target
_TRAIN, _EVAL = 0, 1


class MaskKey(NamedTuple):
    """What decides the masks of one sequence."""

    seed: int
    epoch: int
    stream: int
    sequence: int
    purpose: int = _TRAIN

    @classmethod
    def of_evaluation(cls, sequence: int) -> MaskKey:
        """The fixed masks of held-out sequence number ``sequence``, whatever the run's seed."""
        return cls(0, 0, 0, sequence, _EVAL)


class Masker:
    """Masks sequences of one vocabulary.

    Args:
        vocab_size: Number of ids.
        specials: Ids that are never targets and never drawn.
        probability: Share of text tokens that become targets.
    """

    def __init__(self, vocab_size: int, specials: Specials, probability: float) -> None:
        self._mask = specials.mask
        self._ordinary = np.setdiff1d(np.arange(vocab_size), np.asarray(specials))
        self._is_ordinary = np.isin(np.arange(vocab_size), self._ordinary)
        self._threshold = np.uint64(int(probability * 2.0**64))

    def __call__(
        self, ids: NDArray[np.int64], key: MaskKey
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask one sequence.

        Args:
            ids: Token ids, int64 [N], specials and padding included.
            key: What decides the masks.

        Returns:
            Inputs and labels, both int64 [N]; labels are -100 where there is no target. A sequence
            with any text has at least one target.
        """
        generator = np.random.Philox(
            key=np.array([key.seed, key.purpose], np.uint64),
            counter=np.array([0, key.sequence, key.stream, key.epoch], np.uint64),
        )
        # Raw words, not Generator methods: NumPy keeps only the former stable over versions.
        # Two words a token, side by side: padding behind a token, which depends on the number of
        # context-parallel ranks, changes nothing for it.
        bits = generator.random_raw(2 * len(ids)).reshape(-1, 2).T
        text = self._is_ordinary[ids]
        chosen = text & (bits[0] < self._threshold)
        at = np.flatnonzero(chosen)
        if not len(at) and text.any():
            at = np.argmin(np.where(text, bits[0], np.iinfo(np.uint64).max), keepdims=True)
        # Only targets are looked at from here on, one token in seven.
        words, targets = bits[1, at], ids[at]
        action = (words >> np.uint64(32)).astype(np.float64) / 2.0**32
        drawn = (words & np.uint64(0xFFFFFFFF)) * np.uint64(len(self._ordinary))
        random = self._ordinary[(drawn >> np.uint64(32)).astype(np.int64)]
        inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
        inputs[at] = np.where(action < 0.8, self._mask, np.where(action < 0.9, targets, random))
        labels[at] = targets
        return inputs, labels
