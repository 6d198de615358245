"""The post-LN Longformer encoder, sharded over the sequence."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.models import EncoderConfig
from haloformer.kernels.hidden_dropout import hidden_dropout
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.attention import LongformerSelfAttention
from haloformer.model.dropout_sites import DropoutStep, Site
from haloformer.model.layers import (
    column_linear,
    plain_embedding,
    row_linear,
    tensor_share,
    vocab_embedding,
)
from haloformer.model.positions import roberta_positions
from haloformer.model.recompute import recomputed
from haloformer.model.windows import encoder_window


class Embeddings(nn.Module):
    """Token + position + token-type embeddings, LayerNorm, dropout (RoBERTa layout)."""

    def __init__(
        self, config: EncoderConfig, vocab_size: int, tensor_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        std, size = config.initializer_range, config.hidden_size
        self.dropout = config.hidden_dropout
        self.word_embeddings = vocab_embedding(vocab_size, size, std, tensor_group)
        self.padding_position = config.padding_position
        self.position_embeddings = plain_embedding(config.num_position_rows, size, std)
        self.token_type_embeddings = plain_embedding(config.type_vocab_size, size, std)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        shard: SequenceShard,
        step: DropoutStep | None,
        positions: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """[B, n] int64 token ids of this rank's rows -> [B, n, E]; all tokens are of type 0."""
        if positions is None:
            first, rows = shard.first_row, shard.num_rows
            counted = roberta_positions(shard.attention_mask, self.padding_position)
            positions = counted[:, first : first + rows]
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        hidden = self.norm(hidden + self.token_type_embeddings(torch.zeros_like(input_ids)))
        return drop(hidden, self.dropout, step, 0, Site.EMBEDDINGS, shard)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(
        self, config: EncoderConfig, index: int, tensor_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        std, size = config.initializer_range, config.hidden_size
        self.recompute = config.recompute
        self.layer = index + 1  # layer 0 of the dropout keys is the embeddings
        self.dropout, self.activation_dropout = config.hidden_dropout, config.activation_dropout
        self.attention = LongformerSelfAttention(
            size,
            encoder_window(config, index),
            self.layer,
            dropout=config.attention_dropout,
            std=std,
            tensor_group=tensor_group,
        )
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.features = tensor_share(config.ffn_size, "feed-forward features", tensor_group)
        self.ffn_in = column_linear(size, config.ffn_size, std, tensor_group)
        self.ffn_out = row_linear(config.ffn_size, size, std, tensor_group)
        self.ffn_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """[B, n, E] -> [B, n, E], this rank's rows."""
        attended = self.attention(hidden, shard, step)
        attended = drop(attended, self.dropout, step, self.layer, Site.ATTENTION_OUTPUT, shard)
        hidden = self.attention_norm(hidden + attended)
        output: Tensor = recomputed(self.recompute == "selective", self.feed, hidden, shard, step)
        return output

    def feed(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """The feed-forward half, [B, n, E] -> [B, n, E]."""
        inner = functional.gelu(self.ffn_in(hidden))
        inner = drop(
            inner,
            self.activation_dropout,
            step,
            self.layer,
            Site.FFN_INNER,
            shard,
            first_column=self.features.start,
        )
        output = self.ffn_out(inner)
        output = drop(output, self.dropout, step, self.layer, Site.FFN_OUTPUT, shard)
        normed: Tensor = self.ffn_norm(hidden + output)
        return normed


class LongformerEncoder(nn.Module):
    """Embeddings and layers."""

    def __init__(
        self, config: EncoderConfig, vocab_size: int, tensor_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.embeddings = Embeddings(config, vocab_size, tensor_group)
        self.layers = nn.ModuleList(
            EncoderLayer(config, index, tensor_group) for index in range(config.num_layers)
        )

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        shard: SequenceShard,
        step: DropoutStep | None,
        positions: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """Hidden states of this rank's rows.

        Args:
            input_ids: [B, n] int64.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.
            positions: [B, n] int64 rows of the position table; None counts the real tokens.

        Returns:
            [B, n, E].
        """
        hidden: Tensor = self.embeddings(input_ids, shard, step, positions)
        for layer in self.layers:
            hidden = recomputed(self.recompute == "full", layer, hidden, shard, step)
        return hidden


def drop(
    x: Tensor,
    rate: float,
    step: DropoutStep | None,
    layer: int,
    site: Site,
    shard: SequenceShard,
    first_column: int = 0,
) -> Tensor:
    """Stateless dropout of hidden states [B, n, E] at a site; none without a step."""
    if step is None:
        return x
    key = step.key(layer, site)
    return hidden_dropout(x, rate, key, shard.sample_ids, shard.first_row, first_column)
