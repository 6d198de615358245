"""Extractive question answering with the OR-softmax loss over answer spans."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from haloformer.configs.models import EncoderConfig
from haloformer.kernels.gather import gather_rows
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.layers import plain_linear
from haloformer.model.rows import counted_once


class QaOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass.

    Attributes:
        loss_sum: [] fp32, summed over the examples; counted on context rank 0, else zero.
        logits: [B, N, 2] start and end scores of the whole sequence, the same on every rank.
    """

    loss_sum: Tensor
    logits: Tensor


def or_softmax_loss(
    logits: Float[Tensor, "b n 2"],
    spans: Int[Tensor, "b a 2"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b 2"]]:
    """Negative log of the probability that any of the answers' starts (ends) is chosen.

    With one span this is the cross-entropy; with several, the model may put its mass on any of
    them (Clark and Gardner 2018, used by Longformer for TriviaQA)::

        start scores   0.1  2.0  0.3  1.5         answers start at 1 and 3
        loss           log(e^0.1 + e^2.0 + e^0.3 + e^1.5) - log(e^2.0 + e^1.5)

    Args:
        logits: [B, N, 2] start and end scores.
        spans: [B, A, 2] first and last token of each answer; a place outside 0 .. N-1 (-1 fills
            up) is not an answer.
        mask: [B, N] bool, False = padding, which cannot be chosen; None = all can.

    Returns:
        [B, 2] start and end loss, 0 where no place is an answer; and [B, 2] float, 1 where some
        place is, for those who average.
    """
    num_tokens = logits.shape[1]
    places = torch.arange(num_tokens, device=logits.device)
    hits = (spans[:, :, None, :] == places[:, None]).any(1)  # [B, N, 2]
    if mask is not None:
        hits = hits & mask[..., None]
    answered = hits.any(1)  # [B, 2]
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min)
    # Without an answer every token is one, so that the loss is 0 and its gradient too.
    allowed = hits | ~answered[:, None, :]
    chosen = scores.masked_fill(~allowed, -torch.inf)
    losses = torch.logsumexp(scores, 1) - torch.logsumexp(chosen, 1)  # [B, 2]
    return losses, answered.to(scores.dtype)


class QaHead(nn.Module):
    """A start and an end score per token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.output = plain_linear(config.hidden_size, 2, config.initializer_range)

    def forward(self, hidden: Float[Tensor, "b n e"]) -> Float[Tensor, "b n 2"]:
        """[B, n, E] -> [B, n, 2]."""
        logits: Tensor = self.output(hidden)
        return logits


class LongformerForQuestionAnswering(nn.Module):
    """Encoder and span head; make the question's tokens global.

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
        self.head = QaHead(config)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        labels: Int[Tensor, "b a 2"],
        shard: SequenceShard,
        step: DropoutStep | None = None,
    ) -> QaOutput:
        """Score every token as the start and as the end of an answer.

        Args:
            input_ids: [B, n] int64, this rank's rows.
            labels: [B, A, 2] int64 spans in the whole sequence, the same on all context ranks;
                -1 fills up.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.
        """
        hidden = self.encoder(input_ids, shard, step)
        logits = gather_rows(self.head(hidden), shard.ranks)
        losses, _ = or_softmax_loss(logits, labels, shard.attention_mask)
        return QaOutput(counted_once(losses.sum() / 2, shard), logits)
