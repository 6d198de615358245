"""Causal language model over characters (Longformer section 4).

Windows grow with the layer and two heads of the upper layers are dilated. Positions are rotary;
the paper used Transformer-XL's relative sinusoids, which need a term of their own in every score,
while rotation happens before the attention and leaves the kernels as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.schema import CharLmConfig
from haloformer.kernels.sharded import (
    AttentionDropoutSites,
    DropoutSite,
    SequenceShard,
    sharded_attention,
)
from haloformer.model.dropout_sites import DropoutStep, Site
from haloformer.model.encoder import drop
from haloformer.model.layers import (
    column_linear,
    row_linear,
    vocab_bias,
    vocab_embedding,
    vocab_logits,
)
from haloformer.model.recompute import recomputed
from haloformer.model.targets import Targets, as_targets
from haloformer.model.vocab_loss import token_loss
from haloformer.model.windows import WindowedAttention, char_window

_ROTARY_BASE = 10_000.0


class CausalLmOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass.

    Attributes:
        loss_sum: [] at least fp32, cross-entropy in nats summed over this rank's targets.
        logits: [T, V] at those targets, in row-major order; under tensor parallelism this rank's
            part of the vocabulary.
    """

    loss_sum: Tensor
    logits: Tensor


def rotate(x: Float[Tensor, "b n h d"], first_row: int) -> Float[Tensor, "b n h d"]:
    """Rotate pairs of features by an angle that grows with the position.

    Feature i of the first half and of the second half are one pair, turned by
    position / 10000 ** (2 i / D): the product of a query and a key then depends on their distance.

    Args:
        x: [B, n, H, D] queries or keys, D even.
        first_row: Position in the whole sequence of row 0.
    """
    half = x.shape[-1] // 2
    # Angles in fp64: in fp32 they are off by 0.002 at position 32K and by 0.5 at 8M, each position
    # in its own way, so that the distance would no longer tell the product.
    exponents = torch.arange(half, device=x.device, dtype=torch.float64) / half
    stop = first_row + x.shape[1]
    positions = torch.arange(first_row, stop, device=x.device, dtype=torch.float64)
    angles = positions[:, None] * _ROTARY_BASE**-exponents  # [n, D / 2]
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class CausalAttention(WindowedAttention):
    """Sliding-window attention to the left; there are no global tokens, which would see ahead."""

    def __init__(self, config: CharLmConfig, index: int, tensor_group: ProcessGroup | None) -> None:
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.layer, self.dropout = index + 1, config.attention_dropout
        self.head_dim = size // config.num_heads
        self.set_window(char_window(config, index), tensor_group)
        self.query = column_linear(size, size, std, tensor_group)
        self.key = column_linear(size, size, std, tensor_group)
        self.value = column_linear(size, size, std, tensor_group)
        self.output = row_linear(size, size, std, tensor_group)

    def forward(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """[B, n, E] -> [B, n, E], this rank's rows; ``shard`` has no global tokens."""
        assert shard.num_globals == 0
        query, key, value = (
            linear(hidden).view(*hidden.shape[:2], self.spec.num_heads, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        dropout = None
        if step is not None and self.dropout > 0.0:
            site = DropoutSite(self.dropout, step.key(self.layer, Site.BAND_ATTENTION))
            dropout = AttentionDropoutSites(band=site, global_rows=site)
        key = rotate(key, shard.first_row)
        attended = sharded_attention(
            rotate(query, shard.first_row),
            key,
            value,
            query.new_empty(query.shape[0], 0, *query.shape[2:]),  # a view would keep all rows
            key,
            value,
            self.spec,
            shard,
            dropout=dropout,
            first_head=self.first_head,
        )
        output: Tensor = self.output(attended.flatten(2))
        return output


class CharLayer(nn.Module):
    """LayerNorm before attention and before feed-forward; residuals are not normed."""

    def __init__(self, config: CharLmConfig, index: int, tensor_group: ProcessGroup | None) -> None:
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.layer, self.dropout, self.recompute = (
            index + 1,
            config.hidden_dropout,
            config.recompute,
        )
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = CausalAttention(config, index, tensor_group)
        self.ffn_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.ffn_in = column_linear(size, config.ffn_size, std, tensor_group)
        self.ffn_out = row_linear(config.ffn_size, size, std, tensor_group)

    def forward(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """[B, n, E] -> [B, n, E], this rank's rows."""
        attended = self.attention(self.attention_norm(hidden), shard, step)
        hidden = hidden + drop(
            attended, self.dropout, step, self.layer, Site.ATTENTION_OUTPUT, shard
        )
        return recomputed(self.recompute == "selective", self.feed, hidden, shard, step)

    def feed(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """The feed-forward half, [B, n, E] -> [B, n, E]."""
        output = self.ffn_out(functional.gelu(self.ffn_in(self.ffn_norm(hidden))))
        return hidden + drop(output, self.dropout, step, self.layer, Site.FFN_OUTPUT, shard)


class CharLm(nn.Module):
    """Predicts the next character from a window of those before it.

    Args:
        config: Sizes of the model.
        vocab_size: Entries of the token embedding.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(
        self, config: CharLmConfig, vocab_size: int, tensor_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.vocab_size, self.tensor_group = vocab_size, tensor_group
        self.dropout, self.recompute = config.hidden_dropout, config.recompute
        self.embedding = vocab_embedding(vocab_size, size, config.initializer_range, tensor_group)
        self.layers = nn.ModuleList(
            CharLayer(config, index, tensor_group) for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.bias = vocab_bias(vocab_size, tensor_group)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        labels: Int[Tensor, "b n"] | Targets,
        shard: SequenceShard,
        step: DropoutStep | None = None,
    ) -> CausalLmOutput:
        """Predict what follows each of this rank's rows.

        Args:
            input_ids: [B, n] int64.
            labels: [B, n] int64, the token after each, which the next rank may hold; -100 where
                nothing is predicted. Or the same as ``Targets``, for which a GPU waits nowhere.
            shard: What the sequence is and which rows are here; its global tokens are not used.
            step: Names the dropout masks; None drops nothing.
        """
        shard = replace(
            shard,
            global_positions=shard.global_positions[:, :0],
            global_mask=shard.global_mask[:, :0],
        )
        hidden = self.embedding(input_ids)
        hidden = drop(hidden, self.dropout, step, 0, Site.EMBEDDINGS, shard)
        for layer in self.layers:
            hidden = recomputed(self.recompute == "full", layer, hidden, shard, step)
        targets = as_targets(labels)
        weight = self.embedding.get_parameter("weight")
        features = self.norm(targets.pick(hidden))
        logits = vocab_logits(features, weight, self.bias, self.tensor_group)
        losses = token_loss(logits, targets.tokens, self.vocab_size, self.tensor_group)
        return CausalLmOutput(losses.sum(), logits)
