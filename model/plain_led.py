"""LED under transformers' call: whole sequences in, ``.loss`` and ``.logits`` out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from haloformer.model.led import LedForConditionalGeneration, shift_right
from haloformer.model.longformer import IGNORED_LABEL
from haloformer.model.plain import ModelOutput, PlainModel
from haloformer.model.rows import whole_sequence
from haloformer.model.vocab_loss import token_loss


class PlainLed(PlainModel):
    """Summaries and other short texts from long ones."""

    def __init__(self, model: LedForConditionalGeneration, raw_config: dict[str, Any]) -> None:
        super().__init__(raw_config)
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Predict the target.

        Args:
            input_ids: [B, N] int64 source tokens.
            attention_mask: [B, N], nonzero = real; None = all.
            global_attention_mask: [B, N], nonzero = global; None = none. LED was trained with <s>
                global.
            labels: [B, T] int64 target tokens, -100 where nothing is predicted.
            decoder_input_ids: [B, T] int64; None = the labels (or else the source) shifted right.
        """
        if decoder_input_ids is None:
            start: int = self.raw_config["decoder_start_token_id"]
            source = input_ids if labels is None else labels
            decoder_input_ids = shift_right(source, start, self.pad_token_id)
        shard = whole_sequence(input_ids, attention_mask, global_attention_mask)
        step = self.dropout_step()
        memory = self.model.encode(input_ids, shard, step)
        logits = self.model.logits(self.model.decode(decoder_input_ids, memory, shard, step))
        return ModelOutput(None if labels is None else self._loss(logits, labels), logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels != IGNORED_LABEL
        losses = token_loss(
            logits[targets],
            labels[targets],
            self.model.vocab_size,
            label_smoothing=self.model.label_smoothing,
        )
        return losses.mean()
