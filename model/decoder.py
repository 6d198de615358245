"""The LED decoder: full causal self-attention, cross-attention over sharded encoder states.

Target tokens are few (a summary), so they are split over the ranks that share the source::

    2 ranks, 6 source rows, 4 target rows      rank 0           rank 1
    encoder states (memory)                    0 1 2            3 4 5
    target rows                                0 1              2 3
    self-attention                             keys 0..3 gathered, queries stay
    cross-attention                            queries 0..3 gathered, keys stay
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.schema import LedConfig
from haloformer.kernels.band import Band
from haloformer.kernels.cross_attention import CrossAttention, cross_attention
from haloformer.kernels.dispatch import choose_backend
from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.gather import gather_rows
from haloformer.kernels.hidden_dropout import hidden_dropout
from haloformer.kernels.ranks import Ranks
from haloformer.kernels.sharded import SequenceShard
from haloformer.kernels.spec import WindowSpec
from haloformer.model.dropout_sites import DropoutStep, Site
from haloformer.model.layers import column_linear, row_linear, tensor_share
from haloformer.model.recompute import recomputed


@dataclass(frozen=True, eq=False)
class TargetRows:
    """Which rows of the target this rank holds, and what they look at.

    Attributes:
        shard: The source sequence and this rank's part of it.
        num_rows: Target rows per rank, the same on all ranks; the target is padded to a multiple.
    """

    shard: SequenceShard
    num_rows: int

    @property
    def ranks(self) -> Ranks:
        """The ranks that share source and target."""
        return self.shard.ranks

    @property
    def first_row(self) -> int:
        """Position in the whole target of this rank's first row."""
        return self.shard.rank * self.num_rows

    def drop(
        self,
        x: Tensor,
        rate: float,
        step: DropoutStep | None,
        layer: int,
        site: Site,
        first_column: int = 0,
    ) -> Tensor:
        """Stateless dropout of hidden states [B, t, E] at a site; none without a step."""
        if step is None:
            return x
        key, ids = step.key(layer, site), self.shard.sample_ids
        return hidden_dropout(x, rate, key, ids, self.first_row, first_column)


class DecoderAttention(nn.Module):
    """Projections that self-attention and cross-attention share.

    Args:
        config: Sizes.
        layer: Number of the layer in dropout keys.
        site: Which softmax of the layer this is.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(
        self, config: LedConfig, layer: int, site: Site, tensor_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.layer, self.site, self.dropout = layer, site, config.attention_dropout
        self.heads = tensor_share(config.decoder_heads, "decoder heads", tensor_group)
        self.head_dim = size // config.decoder_heads
        self.query = column_linear(size, size, std, tensor_group)
        self.key = column_linear(size, size, std, tensor_group)
        self.value = column_linear(size, size, std, tensor_group)
        self.output = row_linear(size, size, std, tensor_group)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, E / ranks] -> [B, N, H, D]."""
        return x.view(*x.shape[:-1], len(self.heads), self.head_dim)

    def dropout_at(
        self, step: DropoutStep | None, sample_ids: Tensor, first_row: int
    ) -> AttentionDropout | None:
        """Dropout of this softmax in one step."""
        if step is None or self.dropout == 0.0:
            return None
        key = step.key(self.layer, self.site)
        return AttentionDropout(
            self.dropout, key, sample_ids, first_row=first_row, heads=tuple(self.heads)
        )


class DecoderSelfAttention(DecoderAttention):
    """Every target token sees itself and all before it."""

    def forward(
        self, hidden: Float[Tensor, "b t e"], target: TargetRows, step: DropoutStep | None
    ) -> Float[Tensor, "b t e"]:
        """[B, t, E] -> [B, t, E], this rank's target rows."""
        query, key, value = (
            self.split(linear(hidden)) for linear in (self.query, self.key, self.value)
        )
        # One gather for both: keys and values of a summary are small.
        both = gather_rows(torch.cat([key, value], dim=-1), target.ranks)
        key, value = both[..., : self.head_dim], both[..., self.head_dim :]
        length, num_heads = both.shape[1], len(self.heads)
        band = Band(
            WindowSpec((length - 1,) * num_heads, (0,) * num_heads, (1,) * num_heads),
            offset=target.first_row,
            valid=(0, length),
            dropout=self.dropout_at(step, target.shard.sample_ids, target.first_row),
        )
        attend = choose_backend("auto", query, key, band)
        attended = attend(query, key, value, None, None, band)[0]
        output: Tensor = self.output(attended.flatten(2))
        return output


class DecoderCrossAttention(DecoderAttention):
    """Every target token sees every real source token."""

    def forward(
        self,
        hidden: Float[Tensor, "b t e"],
        memory: Float[Tensor, "b n e"],
        target: TargetRows,
        step: DropoutStep | None,
    ) -> Float[Tensor, "b t e"]:
        """[B, t, E] target rows and [B, n, E] source rows of this rank -> [B, t, E]."""
        shard = target.shard
        what = CrossAttention(
            target.ranks,
            shard.local(shard.attention_mask),
            # All target rows are gathered, so they count from 0.
            dropout=self.dropout_at(step, shard.sample_ids, 0),
            first_column=shard.first_row,
        )
        attended = cross_attention(
            self.split(self.query(hidden)),
            self.split(self.key(memory)),
            self.split(self.value(memory)),
            what,
        )
        output: Tensor = self.output(attended.flatten(2))
        return output


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward: each then dropout, residual, LayerNorm.

    Args:
        config: Sizes.
        layer: Number of the layer in dropout keys; no encoder layer has it.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(self, config: LedConfig, layer: int, tensor_group: ProcessGroup | None) -> None:
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.layer, self.recompute = layer, config.recompute
        self.dropout, self.activation_dropout = config.hidden_dropout, config.activation_dropout
        self.attention = DecoderSelfAttention(config, layer, Site.SELF_ATTENTION, tensor_group)
        self.attention_norm = nn.LayerNorm(size)
        self.cross = DecoderCrossAttention(config, layer, Site.CROSS_ATTENTION, tensor_group)
        self.cross_norm = nn.LayerNorm(size)
        self.features = tensor_share(config.decoder_ffn_size, "decoder features", tensor_group)
        self.ffn_in = column_linear(size, config.decoder_ffn_size, std, tensor_group)
        self.ffn_out = row_linear(config.decoder_ffn_size, size, std, tensor_group)
        self.ffn_norm = nn.LayerNorm(size)

    def forward(
        self,
        hidden: Float[Tensor, "b t e"],
        memory: Float[Tensor, "b n e"],
        target: TargetRows,
        step: DropoutStep | None,
    ) -> Float[Tensor, "b t e"]:
        """[B, t, E] target rows and [B, n, E] source rows of this rank -> [B, t, E]."""
        rate, layer = self.dropout, self.layer
        attended = self.attention(hidden, target, step)
        attended = target.drop(attended, rate, step, layer, Site.ATTENTION_OUTPUT)
        hidden = self.attention_norm(hidden + attended)
        crossed = self.cross(hidden, memory, target, step)
        crossed = target.drop(crossed, rate, step, layer, Site.CROSS_OUTPUT)
        hidden = self.cross_norm(hidden + crossed)
        return recomputed(self.recompute == "selective", self.feed, hidden, target, step)

    def feed(
        self, hidden: Float[Tensor, "b t e"], target: TargetRows, step: DropoutStep | None
    ) -> Float[Tensor, "b t e"]:
        """The feed-forward part, [B, t, E] -> [B, t, E]."""
        inner = functional.gelu(self.ffn_in(hidden))
        rate, first = self.activation_dropout, self.features.start
        inner = target.drop(inner, rate, step, self.layer, Site.FFN_INNER, first)
        output = self.ffn_out(inner)
        output = target.drop(output, self.dropout, step, self.layer, Site.FFN_OUTPUT)
        normed: Tensor = self.ffn_norm(hidden + output)
        return normed
