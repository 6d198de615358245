"""Multiple choice and multi-hop question answering over many documents (WikiHop)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.models import EncoderConfig
from haloformer.kernels.gather import gather_at
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.layers import plain_linear
from haloformer.model.rows import counted_once


class ChoiceOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass.

    Attributes:
        loss_sum: [] at least fp32, summed over the examples; counted on context rank 0, else zero.
        logits: [B, C] score of every candidate, far below zero in unused slots; the same on every
            context rank.
    """

    loss_sum: Tensor
    logits: Tensor


class LongformerForMultipleChoice(nn.Module):
    """Scores candidates by the token that stands before each in the sequence.

    ::

        [q] who wrote it? [/q] [ent] Ann [/ent] [ent] Bob [/ent] <s> text ... </s> text ...
                               ^                ^
        candidates             7                10

    The question and the candidates are global tokens, so that a score has seen all documents.

    Args:
        config: Sizes of the encoder.
        vocab_size: Entries of the token embedding.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(
        self, config: EncoderConfig, vocab_size: int, tensor_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.encoder = LongformerEncoder(config, vocab_size, tensor_group)
        self.output = plain_linear(config.hidden_size, 1, config.initializer_range)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        candidates: Int[Tensor, "b c"],
        candidate_mask: Bool[Tensor, "b c"],
        labels: Int[Tensor, "b"],
        shard: SequenceShard,
        step: DropoutStep | None = None,
    ) -> ChoiceOutput:
        """Choose a candidate.

        Args:
            input_ids: [B, n] int64, this rank's rows.
            candidates: [B, C] int64 positions in the whole sequence, the same on all ranks.
            candidate_mask: [B, C], False = an unused slot.
            labels: [B] int64, number of the right candidate; -100 = not counted.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.
        """
        hidden = self.encoder(input_ids, shard, step)
        rows = gather_at(hidden, candidates.where(candidate_mask, 0), shard.ranks)
        scores = self.output(rows)[..., 0]
        scores = scores if scores.dtype == torch.float64 else scores.float()
        logits = scores.masked_fill(~candidate_mask, torch.finfo(scores.dtype).min)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return ChoiceOutput(counted_once(loss, shard), logits)
