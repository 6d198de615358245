"""Labels of causal language modelling: every token is to predict the one after it.

    ids      <s>  a   b   c  </s> <pad>
    labels    a   b   c   -    -    -        specials are no targets, as in masking

Labels are made on the whole sequence, before it is cut over ranks, so that none is lost at a cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.mlm import IGNORED, MaskKey
from haloformer.data_pipeline.tokenizers import Specials


class NextToken:
    """Labels sequences; it takes the place of ``Masker`` and masks nothing.

    Args:
        vocab_size: Number of ids.
        specials: Ids that are never targets.
    """

    def __init__(self, vocab_size: int, specials: Specials) -> None:
        self._label_of = np.arange(vocab_size)
        self._label_of[np.asarray(specials)] = IGNORED

    def __call__(
        self, ids: NDArray[np.int64], key: MaskKey
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Label one sequence.

        Args:
            ids: Token ids, int64 [N], specials and padding included.
            key: Not looked at: nothing is drawn.

        Returns:
            Inputs, which are the ids, and labels, both int64 [N]; -100 where there is no target.
        """
        labels = np.empty_like(ids)
        labels[:-1] = self._label_of[ids[1:]]
        labels[-1] = IGNORED
        return ids, labels
