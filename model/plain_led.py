"""LED under transformers' call: whole sequences in, ``.loss`` and ``.logits`` out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from haloformer.model.generate import SearchSettings, generate
from haloformer.model.led import LedForConditionalGeneration, shift_right
from haloformer.model.plain import ModelOutput, PlainModel
from haloformer.model.rows import whole_sequence
from haloformer.model.targets import IGNORED_LABEL
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

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        max_length: int = 142,
        min_length: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        early_stopping: bool = False,
    ) -> Tensor:
        """Write an answer to each source; arguments as in transformers.

        Args:
            input_ids: [B, N] int64 source tokens.
            attention_mask: [B, N], nonzero = real; None = all.
            global_attention_mask: [B, N], nonzero = global; None = none.
            max_length: Most tokens, the start token included.
            min_length: Least tokens, the start token included.
            num_beams: 1 is greedy.
            length_penalty: Above 0 favours longer answers (beams only).
            no_repeat_ngram_size: No n-gram of this size comes twice; 0 = may.
            early_stopping: Stop when ``num_beams`` answers are finished.

        Returns:
            [B, T] int64 from the start token on, padded with the padding token.
        """
        settings = SearchSettings(
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            early_stopping=early_stopping,
            start_token=self.raw_config["decoder_start_token_id"],
            eos_token=self.raw_config["eos_token_id"],
            pad_token=self.pad_token_id,
        )
        shard = whole_sequence(input_ids, attention_mask, global_attention_mask)
        return generate(self.model, input_ids, shard, settings)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels != IGNORED_LABEL
        losses = token_loss(
            logits[targets],
            labels[targets],
            self.model.vocab_size,
            label_smoothing=self.model.label_smoothing,
        )
        return losses.mean()
