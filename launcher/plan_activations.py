"""What a forward pass keeps for its backward, tensor by tensor, and what the backward adds.

::

    encoder layer     input -> q k v -> band -> rows -> sum -> norm -> inner -> gelu -> sum -> norm
    kept              E        3E       E+lse   E       E      E       F        F       E
    selective         E        3E       E+lse   E       E      E       .        .       .
    full              E        .        .       .       .      .       .        .       .

E is B * n * hidden elements, F is B * n * ffn; a dropout keeps a byte per element. Parameters are
not counted here. The tests compare these sums with the tensors that autograd holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from haloformer.launcher.plan_model import FP32, Layer, Model, Rows, Split

# Cross-attention works on so many target rows at a time (kernels.cross_attention.BLOCK_ROWS).
CROSS_BLOCK = 64
_LOSS_AT_ONCE = 1 << 20  # elements, as model/vocab_loss.py
_INT64 = 8


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors that a layer is made of, on one rank.

    Attributes:
        whole: [B, rows, hidden].
        share: The same, split over the tensor-parallel ranks.
        inner: [B, rows, ffn], split as well.
        elements: Of ``whole``: a dropout mask has as many bytes.
        inner_elements: Of ``inner``.
        heads: [B, rows, heads] in fp32, for statistics of a softmax.
        norm: [B, rows] twice in fp32, for statistics of a LayerNorm.
    """

    whole: int
    share: int
    inner: int
    elements: int
    inner_elements: int
    heads: int
    norm: int

    @classmethod
    def of(cls, model: Model, layer: Layer, batch: int, rows: int, split: Split) -> Sizes:
        """The sizes for so many rows."""
        count, width = batch * rows, split.width
        inner = count * layer.ffn // split.tensor
        return cls(
            whole=count * model.hidden * width,
            share=count * model.hidden // split.tensor * width,
            inner=inner * width,
            elements=count * model.hidden,
            inner_elements=inner,
            heads=count * layer.heads // split.tensor * FP32,
            norm=2 * count * FP32,
        )


def attention_kept(model: Model, layer: Layer, rows: Rows, split: Split) -> Counter[str]:
    """Kept by the attention half, the layer's input and the feed-forward half's included."""
    if layer.kind == "decoder":
        return _decoder_attention(model, layer, rows, split)
    size = Sizes.of(model, layer, rows.batch, rows.source, split)
    kept = Counter(
        {
            "layer input": size.whole,
            "query, key, value": 3 * size.share,
            "band output": size.share,
            "softmax statistics": size.heads,
            "attended rows": size.share,
            "halo": halo_kept(model, layer, rows, split),
            "attention dropout": size.elements if layer.hidden_dropout else 0,
            "attention sum": size.whole,
            "attention norm statistics": size.norm,
        }
    )
    if layer.kind == "char":
        kept["input norm output"] = size.whole
        # cos and sin, for queries and keys alike.
        kept["rotation"] = 4 * rows.source * (model.hidden // layer.heads // 2) * split.width
        # The norms stand in front, so the sum is what the second one reads.
        kept["feed-forward norm output"] = size.whole
    else:
        kept["feed-forward input"] = size.whole
        kept += _globals_kept(model, layer, rows, split)
    return kept


def _globals_kept(model: Model, layer: Layer, rows: Rows, split: Split) -> Counter[str]:
    """Kept for the global rows: a few vectors folded, else two projections of the sequence."""
    count, width = rows.batch * rows.num_globals, split.width
    share, heads = model.hidden // split.tensor, layer.heads // split.tensor
    kept = Counter({"globals": count * (model.hidden + 2 * share) * width})
    if folds(model, layer, rows, split):
        features = model.hidden + 1
        # Scaled query and folded query; the answer and its statistics in fp32, and its cast.
        casts = 0 if width == FP32 else heads * features
        kept["globals"] += count * (share + heads * features + casts) * width
        kept["globals"] += count * heads * (features + 1) * FP32
    else:
        kept["global key, value"] = 2 * rows.batch * rows.source * share * width
        kept["globals"] += count * share * width + count * (share + heads) * FP32
    return kept


def folds(model: Model, layer: Layer, rows: Rows, split: Split) -> bool:
    """Whether the global projections fold (``kernels.fold``); megatron-core's linears cannot."""
    return split.tensor == 1 and rows.num_globals * layer.heads < model.hidden


def halo_kept(model: Model, layer: Layer, rows: Rows, split: Split) -> int:
    """K and V of the halo: as many rows as the windows reach, beyond the sequence too."""
    if split.context == 1 or layer.spec is None:
        return 0
    head_dim, heads = model.hidden // layer.heads, layer.heads // split.tensor
    spec = layer.spec.select(range(layer.heads - heads, layer.heads))  # the last reach farthest
    reach = sum(
        len(group) * (spec.select(group).reach_left + spec.select(group).reach_right)
        for group in spec.groups_by_reach()
    )
    return 2 * rows.batch * reach * head_dim * split.width


def _decoder_attention(model: Model, layer: Layer, rows: Rows, split: Split) -> Counter[str]:
    own = Sizes.of(model, layer, rows.batch, rows.target, split)
    every = Sizes.of(model, layer, rows.batch, rows.target * split.context, split)
    source = Sizes.of(model, layer, rows.batch, rows.source, split)
    dropped = own.elements if layer.hidden_dropout else 0
    fp32 = every.share // split.width * FP32
    # A cast is of all rows; without one, this rank's rows are put in order by a copy.
    answered = own.share if split.width == FP32 else every.share
    return Counter(
        {
            "layer input": own.whole,
            "query": own.share,
            "gathered key, value": 2 * every.share,
            "self-attention output": own.share + own.heads,
            "self-attention dropout": dropped,
            "self-attention sum": own.whole + own.norm,
            "cross input": own.whole,
            "gathered query": every.share,
            "source key, value": 2 * source.share,
            "cross output": answered + fp32 + every.heads,
            "cross dropout": dropped,
            "cross sum": own.whole + own.norm,
            "feed-forward input": own.whole,
        }
    )


def feed_kept(model: Model, layer: Layer, rows: Rows, split: Split) -> Counter[str]:
    """Kept by the feed-forward half, without its input."""
    count = rows.target if layer.kind == "decoder" else rows.source
    size = Sizes.of(model, layer, rows.batch, count, split)
    kept = Counter(
        {
            "inner": size.inner,
            "gelu": size.inner,
            "inner dropout": size.inner_elements if layer.activation_dropout else 0,
            "feed-forward dropout": size.elements if layer.hidden_dropout else 0,
        }
    )
    if layer.kind == "char":
        kept["feed-forward norm statistics"] = size.norm
    else:
        kept["feed-forward sum"] = size.whole + size.norm
    return kept


def layer_kept(model: Model, layer: Layer, rows: Rows, split: Split) -> int:
    """Bytes that one layer keeps from its forward to its backward."""
    attention = attention_kept(model, layer, rows, split)
    if split.recompute == "full":
        return attention["layer input"]
    kept = sum(attention.values())
    if split.recompute == "selective":
        if layer.kind == "char":  # the norm in front of it is a part of what is recomputed
            kept -= attention["feed-forward norm output"]
        return kept
    return kept + sum(feed_kept(model, layer, rows, split).values())


def embeddings_kept(model: Model, rows: Rows, split: Split) -> int:
    """Indices of the tables, and what the norm and the dropout of the embeddings keep."""
    layer = model.layers[0]
    size = Sizes.of(model, layer, rows.batch, rows.source, split)
    num_tables = {"led": 1, "char_lm": 1}.get(model.kind, 3)  # tokens; positions and types
    kept = num_tables * _INT64 * rows.batch * rows.source
    if layer.hidden_dropout:
        kept += size.elements
    if model.kind != "char_lm":
        kept += size.whole + size.norm
    if model.has_decoder:
        own = Sizes.of(model, model.layers[-1], rows.batch, rows.target, split)
        kept += own.whole + own.norm + _INT64 * rows.batch * rows.target
        kept += _INT64 * (rows.source + rows.target)  # positions, the same in every sequence
        kept += own.elements if layer.hidden_dropout else 0
        kept += size.whole  # the encoder's states, which every decoder layer reads
    return kept


@dataclass(frozen=True)
class Head:
    """Bytes around the loss.

    Attributes:
        kept: From the forward to the backward, logits included.
        added: On top of it, for a moment of the backward.
    """

    kept: int
    added: int


def head_of(model: Model, rows: Rows, split: Split) -> Head:
    """The head and the loss at the predicted rows.

    The loss computes in fp32, a few rows at a time. Its gradient is as large as the logits, and
    is copied once more for the product that gives the gradient of the table.
    """
    features = rows.predicted * model.hidden * split.width
    if not model.scores_vocabulary:
        return Head(2 * features, 0)
    logits = rows.predicted * -(-model.vocab // split.tensor)
    added = logits * split.width + max(logits * split.width, min(logits, _LOSS_AT_ONCE) * FP32)
    # Inputs of dense, gelu, norm, vocabulary; of norm and vocabulary; of the vocabulary.
    kept = {"longformer_mlm": 4, "char_lm": 2, "led": 1}[model.kind] * features
    if model.kind != "led":
        kept += 2 * rows.predicted * FP32  # statistics of the norm
    # Which rows are predicted; of each its target, log-sum-exp and whether it is here.
    kept += rows.predicted * (2 * _INT64 + FP32 + 1)
    return Head(kept + logits * split.width, added)


def feed_backward(model: Model, layer: Layer, rows: Rows, split: Split) -> int:
    """Added when the gradient passes the outer linear of a feed-forward half.

    Gradients of the sum and of the dropped output, and of the inner features, in place of the
    kept input of the norm behind them.
    """
    count = rows.target if layer.kind == "decoder" else rows.source
    size = Sizes.of(model, layer, rows.batch, count, split)
    gradients = (2 if layer.hidden_dropout else 1) * size.whole + size.inner
    freed = feed_kept(model, layer, rows, split)
    return gradients - freed["feed-forward sum"] - freed["feed-forward dropout"]


def attention_backward(model: Model, layer: Layer, rows: Rows, split: Split) -> int:
    """Added when the gradient passes the attention, with the feed-forward half freed."""
    if layer.kind == "decoder":
        own = Sizes.of(model, layer, rows.batch, rows.target, split)
        source = Sizes.of(model, layer, rows.batch, rows.source, split)
        fp32 = source.share // split.width * FP32
        # Scores of a block of rows and their gradients; K, V and their gradients in fp32, and the
        # product that is being added to one of them.
        block = min(CROSS_BLOCK, rows.target * split.context)
        scores = source.heads * block
        return 2 * scores + 5 * fp32 + source.whole + own.whole
    size = Sizes.of(model, layer, rows.batch, rows.source, split)
    # Gradients of the residual; of the attended rows, with and without the overwritten ones; of
    # queries, keys and values.
    return size.whole + 5 * size.share
