"""Floating-point operations of a model, from its numbers and those of a batch.

Counted is every matrix product, a multiply-add as 2: the band by its true width plus the global
columns, the loss at predicted rows only, the decoder by the pairs of rows that see one another. Not
counted: norms, softmax, dropout, and what is computed again (as usual for MFU).

::

    a pair of 5 source and 3 target tokens     encoder rows 5, decoder rows 3, pairs 5 * 3,
                                               seen 1 + 2 + 3 = 6
"""

from __future__ import annotations

from dataclasses import dataclass

from haloformer.launcher.plan_model import Model


@dataclass(frozen=True)
class Work:
    """Real rows of a batch, padding left out.

    Attributes:
        source: Rows of the windowed layers.
        num_globals: Global tokens of a sequence, in the mean.
        predicted: Rows with a loss.
        target: Rows of a decoder.
        pairs: Source rows times target rows, summed over the sequences.
        seen: Target rows that target rows see, themselves included, summed over all.
    """

    source: float
    num_globals: float
    predicted: float
    target: float = 0.0
    pairs: float = 0.0
    seen: float = 0.0


def forward_flops(model: Model, work: Work) -> float:
    """Operations of one forward pass over a batch."""
    size = model.hidden
    flops = 0.0
    for layer in model.layers:
        # Query, key, value, output; and the feed-forward half.
        per_row = 2.0 * 4 * size * size + 2 * 2 * size * layer.ffn
        if layer.kind == "decoder":
            # Query and output of cross-attention too; its key and value are of source rows.
            flops += work.target * (per_row + 2 * 2 * size * size)
            flops += work.source * 2 * 2 * size * size
            flops += 2 * 2 * size * (work.pairs + work.seen)
        else:
            per_row += 2 * 2 * size * (layer.mean_band + work.num_globals)
            if layer.kind == "encoder":
                per_row += _global_rows(size, layer.heads, work.num_globals)
            flops += work.source * per_row
    return flops + work.predicted * _head(model)


def training_flops(model: Model, work: Work) -> float:
    """Forward and backward: the backward of a product is two products of the same size."""
    return 3.0 * forward_flops(model, work)


def _global_rows(size: int, heads: int, num_globals: float) -> float:
    """Per row of the sequence: products over it, folded or over projections made for them."""
    if num_globals * heads < size:  # kernels.fold.folding_pays
        return 2 * 2 * size * heads * num_globals
    return 2 * 2 * size * (size + num_globals)


def _head(model: Model) -> float:
    """Per predicted row: what stands on the layers, and the tied projection."""
    matrices = sum(count for count, is_matrix in model.head if is_matrix)
    vocabulary = model.hidden * model.vocab if model.scores_vocabulary else 0
    return 2.0 * (matrices + vocabulary)
