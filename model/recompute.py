"""Activation recompute: give up what a layer keeps for its backward, and compute it again.

With stateless dropout it is exact: the same elements are dropped, with no generator to restore.

    none       keep everything
    selective  keep attention, recompute the feed-forward half: its inner activations are the
               widest, and no rank has to be asked again
    full       keep a layer's input only; its exchanges run once more in the backward
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(again: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call a function, keeping only its inputs for the backward where ``again`` is true."""
    if not again:
        return function(*inputs)
    # Generators play no part, so their state is not saved either.
    output: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
