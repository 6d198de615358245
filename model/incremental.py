"""The LED decoder one token at a time, with what it has computed kept.

::

    source rows 0..5 on 2 ranks; 2 hypotheses of one example

    rank 0: keys 0 1 2 | tokens of both hypotheses     every rank carries all hypotheses, and
    rank 1: keys 3 4 5 | tokens of both hypotheses     answers for its part of the source

Hypotheses of one example share the keys and values of its source: they are never copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from haloformer.kernels.merge import merge_over_ranks
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.decoder import DecoderCrossAttention, DecoderLayer, DecoderSelfAttention
from haloformer.model.led import LedForConditionalGeneration


@dataclass
class LayerCache:
    """What one decoder layer keeps.

    Attributes:
        source_key: [B, H, n, D] of this rank's source rows.
        source_value: [B, H, n, D].
        key: [R, H, T, D] of the tokens so far, room for T; R hypotheses.
        value: [R, H, T, D].
    """

    source_key: Tensor
    source_value: Tensor
    key: Tensor
    value: Tensor


class IncrementalDecoder:
    """Decodes R = B x num_hypotheses rows, those of an example side by side.

    Args:
        model: LED on one tensor-parallel rank.
        memory: [B, n, E] encoder states of this rank's source rows.
        shard: What the source sequence is and which rows are here.
        num_hypotheses: Rows per example.
        max_length: Most tokens per row.

    Raises:
        ValueError: If the model is split over tensor ranks, or has fewer positions than asked for.
    """

    def __init__(
        self,
        model: LedForConditionalGeneration,
        memory: Float[Tensor, "b n e"],
        shard: SequenceShard,
        num_hypotheses: int,
        max_length: int,
    ) -> None:
        if model.tensor_group is not None:
            raise ValueError("generation needs the whole vocabulary on a rank; use tensor size 1")
        limit = model.decoder.embeddings.positions.num_embeddings
        if max_length > limit:
            raise ValueError(
                f"max_length {max_length} is more than the {limit} positions of the decoder"
            )
        self.model, self.shard, self.length = model, shard, 0
        self.hidden_source = ~shard.local(shard.attention_mask)  # [B, n]
        rows = memory.shape[0] * num_hypotheses
        self.caches = [self._cache(layer, memory, rows, max_length) for layer in self._layers()]

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.model.decoder.layers if isinstance(layer, DecoderLayer)]

    def _cache(self, layer: DecoderLayer, memory: Tensor, rows: int, max_length: int) -> LayerCache:
        cross = layer.cross
        source_key, source_value = (
            cross.split(linear(memory)).transpose(1, 2).contiguous()
            for linear in (cross.key, cross.value)
        )
        room = memory.new_empty(rows, len(cross.heads), max_length, cross.head_dim)
        return LayerCache(source_key, source_value, room, torch.empty_like(room))

    def step(self, tokens: Int[Tensor, "r"]) -> Float[Tensor, "r v"]:
        """Read the next token of every row.

        Args:
            tokens: [R] int64, the same on all ranks.

        Returns:
            [R, V] logits of the token after it.
        """
        hidden: Tensor = self.model.shared(tokens)[:, None]
        embeddings = self.model.decoder.embeddings
        hidden = embeddings(hidden, self.length, self.shard.sample_ids, None)
        for layer, cache in zip(self._layers(), self.caches, strict=True):
            attended = self._attend_target(layer.attention, cache, hidden)
            hidden = layer.attention_norm(hidden + attended)
            crossed = self._attend_source(layer.cross, cache, hidden)
            hidden = layer.cross_norm(hidden + crossed)
            hidden = layer.ffn_norm(hidden + layer.ffn_out(functional.gelu(layer.ffn_in(hidden))))
        self.length += 1
        return self.model.logits(hidden[:, 0])

    def reorder(self, rows: Int[Tensor, "r"]) -> None:
        """Make row i go on from what row ``rows[i]`` has read."""
        used = slice(0, self.length)
        for cache in self.caches:
            for kept in (cache.key, cache.value):
                kept[:, :, used] = kept[rows][:, :, used]

    def _attend_target(
        self, attention: DecoderSelfAttention, cache: LayerCache, hidden: Tensor
    ) -> Tensor:
        """[R, 1, E] -> [R, 1, E] over the tokens so far."""
        query, key, value = (
            attention.split(linear(hidden)).transpose(1, 2)  # [R, H, 1, D]
            for linear in (attention.query, attention.key, attention.value)
        )
        end = self.length + 1
        cache.key[:, :, self.length : end] = key
        cache.value[:, :, self.length : end] = value
        attended = functional.scaled_dot_product_attention(
            query, cache.key[:, :, :end], cache.value[:, :, :end]
        )
        output: Tensor = attention.output(attended.transpose(1, 2).flatten(2))
        return output

    def _attend_source(
        self, attention: DecoderCrossAttention, cache: LayerCache, hidden: Tensor
    ) -> Tensor:
        """[R, 1, E] -> [R, 1, E]; an example's hypotheses are rows of one product."""
        query = attention.split(attention.query(hidden[:, 0]))  # [R, H, D]
        num_examples = cache.source_key.shape[0]
        query = query.view(num_examples, -1, *query.shape[1:]).transpose(1, 2)  # [B, H, K, D]
        scores = (query * attention.head_dim**-0.5) @ cache.source_key.mT
        scores = scores if scores.dtype == torch.float64 else scores.float()
        scores = scores.masked_fill(self.hidden_source[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
        part = (weights.to(hidden.dtype) @ cache.source_value).to(scores.dtype)
        merged = merge_over_ranks(part, lse, self.shard.ranks)[0].to(hidden.dtype)
        output: Tensor = attention.output(merged.transpose(1, 2).flatten(2).flatten(0, 1))
        return output[:, None]
