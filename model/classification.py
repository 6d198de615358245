"""Sequence classification on <s>."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.models import EncoderConfig
from haloformer.kernels.hidden_dropout import hidden_dropout
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.dropout_sites import DropoutStep, Site
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.layers import plain_linear
from haloformer.model.rows import counted_once, first_rows


class ClassificationOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass.

    Attributes:
        loss_sum: [] fp32, cross-entropy in nats summed over the examples; counted on context
            rank 0 and zero on the others.
        logits: [B, num_labels], the same on every context rank.
    """

    loss_sum: Tensor
    logits: Tensor


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection (RoBERTa)."""

    def __init__(self, config: EncoderConfig, num_labels: int) -> None:
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.dropout = config.hidden_dropout
        self.layer = config.num_layers + 1
        self.dense = plain_linear(size, size, std)
        self.output = plain_linear(size, num_labels, std)

    def forward(
        self, pooled: Float[Tensor, "b e"], sample_ids: Int[Tensor, "b"], step: DropoutStep | None
    ) -> Float[Tensor, "b c"]:
        """[B, E] -> [B, num_labels] logits."""
        pooled = self._drop(pooled, Site.HEAD_INPUT, sample_ids, step)
        inner = self._drop(torch.tanh(self.dense(pooled)), Site.HEAD_INNER, sample_ids, step)
        logits: Tensor = self.output(inner)
        return logits

    def _drop(self, x: Tensor, site: Site, sample_ids: Tensor, step: DropoutStep | None) -> Tensor:
        if step is None:
            return x
        key = step.key(self.layer, site)
        return hidden_dropout(x[:, None], self.dropout, key, sample_ids)[:, 0]


class LongformerForSequenceClassification(nn.Module):
    """Encoder and classification head; make <s> global, so that it has seen the document.

    Args:
        config: Sizes of the encoder.
        vocab_size: Entries of the token embedding.
        num_labels: Number of classes.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(
        self,
        config: EncoderConfig,
        vocab_size: int,
        num_labels: int,
        tensor_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.encoder = LongformerEncoder(config, vocab_size, tensor_group)
        self.head = ClassificationHead(config, num_labels)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        labels: Int[Tensor, "b"],
        shard: SequenceShard,
        step: DropoutStep | None = None,
    ) -> ClassificationOutput:
        """Classify whole sequences.

        Args:
            input_ids: [B, n] int64, this rank's rows.
            labels: [B] int64, the same on all context ranks; -100 = not counted.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.
        """
        hidden = self.encoder(input_ids, shard, step)
        logits = self.head(first_rows(hidden, shard), shard.sample_ids, step)
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
        return ClassificationOutput(counted_once(loss, shard), logits)
