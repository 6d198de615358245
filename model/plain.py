"""Our models under transformers' call: whole sequences in, ``.loss`` and ``.logits`` out.

No process group, no DeepSpeed, no configuration system: a plain ``nn.Module`` for anyone's
training loop. ``.model`` is the same model under the sharded call that the trainer uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from haloformer.kernels.sharded import SequenceShard
from haloformer.model.classification import LongformerForSequenceClassification
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.layers import plain_linear
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.positions import roberta_positions
from haloformer.model.question_answering import LongformerForQuestionAnswering, or_softmax_loss
from haloformer.model.rows import first_rows, whole_sequence


@dataclass
class ModelOutput:
    """What a plain model returns; attributes as transformers names them.

    Attributes:
        loss: [] mean over the targets, None without labels.
        logits: Scores; None for the bare encoder.
        last_hidden_state: [B, N, E], of the bare encoder.
        pooler_output: [B, E], of the bare encoder if it has a pooler.
        start_logits: [B, N], of question answering.
        end_logits: [B, N], of question answering.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None


class PlainModel(nn.Module):
    """What all plain models share.

    Attributes:
        raw_config: transformers' config.json of this model.
        pad_token_id: Token that stands for no token.
    """

    def __init__(self, raw_config: dict[str, Any]) -> None:
        super().__init__()
        self.raw_config = raw_config
        self.pad_token_id: int = raw_config["pad_token_id"]

    def dropout_step(self) -> DropoutStep | None:
        """Dropout of this forward pass: None in eval mode, else drawn from torch's generator.

        So ``torch.manual_seed`` governs it as it does ``nn.Dropout``, and torch's activation
        checkpointing, which restores the generator, drops the same elements again.
        """
        if not self.training:
            return None
        return DropoutStep(int(torch.randint(2**62, ())), 0)

    def encode(
        self, encoder: LongformerEncoder, input_ids: Tensor, shard: SequenceShard
    ) -> tuple[Tensor, DropoutStep | None]:
        """Hidden states [B, N, E] of a Longformer, and the dropout of this pass."""
        # transformers tells padding by the token, not by the mask, when it counts positions.
        real = input_ids != self.pad_token_id
        positions = roberta_positions(real, encoder.embeddings.padding_position)
        self._check_length(int(positions.max()), encoder.embeddings.position_embeddings)
        step = self.dropout_step()
        return encoder(input_ids, shard, step, positions), step

    def _check_length(self, last: int, table: nn.Embedding) -> None:
        if last >= table.num_embeddings:
            raise ValueError(
                f"a sequence needs position {last}, the model has {table.num_embeddings}; "
                "shorten the input, or convert the model with a larger --max-positions"
            )


class PlainEncoder(PlainModel):
    """A Longformer without a head (transformers' LongformerModel)."""

    def __init__(
        self, model: LongformerEncoder, raw_config: dict[str, Any], *, has_pooler: bool
    ) -> None:
        super().__init__(raw_config)
        self.encoder = model
        size = raw_config["hidden_size"]
        self.pooler = plain_linear(size, size, 0.02) if has_pooler else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: None = None,
    ) -> ModelOutput:
        """[B, N] ids and masks -> ``last_hidden_state`` [B, N, E] and ``pooler_output``."""
        if labels is not None:
            raise ValueError("this model has no head, so it cannot use labels; leave them out")
        shard = whole_sequence(input_ids, attention_mask, global_attention_mask)
        hidden, _ = self.encode(self.encoder, input_ids, shard)
        pooled = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(first_rows(hidden, shard)))
        return ModelOutput(last_hidden_state=hidden, pooler_output=pooled)


class PlainMaskedLM(PlainModel):
    """Masked language modelling; logits at every position, as transformers gives them."""

    def __init__(self, model: LongformerForMaskedLM, raw_config: dict[str, Any]) -> None:
        super().__init__(raw_config)
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Predict every token.

        Args:
            input_ids: [B, N] int64.
            attention_mask: [B, N], nonzero = real; None = all.
            global_attention_mask: [B, N], nonzero = global; None = none.
            labels: [B, N] int64, -100 where nothing is predicted.
        """
        shard = whole_sequence(input_ids, attention_mask, global_attention_mask)
        hidden, _ = self.encode(self.model.encoder, input_ids, shard)
        logits = self.model.head(hidden, self.model.encoder.embeddings.word_embeddings.weight)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return ModelOutput(loss, logits)


class PlainClassifier(PlainModel):
    """Sequence classification or regression."""

    def __init__(
        self, model: LongformerForSequenceClassification, raw_config: dict[str, Any]
    ) -> None:
        super().__init__(raw_config)
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Classify sequences.

        Args:
            input_ids: [B, N] int64.
            attention_mask: [B, N], nonzero = real; None = all.
            global_attention_mask: [B, N], nonzero = global; None = token 0 alone.
            labels: [B] int64 classes; [B] floats for regression (one label); [B, C] floats for
                several labels at once.
        """
        if global_attention_mask is None:
            global_attention_mask = torch.zeros_like(input_ids)
            global_attention_mask[:, 0] = 1
        shard = whole_sequence(input_ids, attention_mask, global_attention_mask)
        hidden, step = self.encode(self.model.encoder, input_ids, shard)
        logits = self.model.head(first_rows(hidden, shard), shard.sample_ids, step)
        return ModelOutput(None if labels is None else self._loss(logits, labels), logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._problem(logits.shape[-1], labels) == "regression":
            return functional.mse_loss(logits.squeeze(), labels.squeeze())
        if self._problem(logits.shape[-1], labels) == "multi_label_classification":
            return functional.binary_cross_entropy_with_logits(logits, labels)
        return functional.cross_entropy(logits, labels.flatten())

    def _problem(self, num_labels: int, labels: Tensor) -> str:
        named: str | None = self.raw_config.get("problem_type")
        if named is not None:
            return named
        if num_labels == 1:
            return "regression"
        whole = labels.dtype in (torch.int64, torch.int32)
        return "single_label_classification" if whole else "multi_label_classification"


class PlainQuestionAnswering(PlainModel):
    """Extractive question answering."""

    def __init__(self, model: LongformerForQuestionAnswering, raw_config: dict[str, Any]) -> None:
        super().__init__(raw_config)
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> ModelOutput:
        """Score the starts and ends of answers.

        Args:
            input_ids: [B, N] int64.
            attention_mask: [B, N], nonzero = real; None = all.
            global_attention_mask: [B, N], nonzero = global; None = the question, which is what
                stands before the first ``sep_token_id``.
            labels: [B, A, 2] int64 answer spans, -1 fills up; the loss is the OR-softmax.
            start_positions: [B] int64, transformers' way to give one span.
            end_positions: [B] int64.
        """
        if global_attention_mask is None:
            global_attention_mask = self._question(input_ids)
        shard = whole_sequence(input_ids, attention_mask, global_attention_mask)
        hidden, _ = self.encode(self.model.encoder, input_ids, shard)
        logits = self.model.head(hidden)
        spans = labels
        if spans is None and start_positions is not None and end_positions is not None:
            spans = torch.stack([start_positions.flatten(), end_positions.flatten()], -1)[:, None]
            # transformers takes a negative position for token 0 and ignores one beyond the end.
            spans = spans.clamp(min=0)
        loss = None
        if spans is not None:
            losses, answered = or_softmax_loss(logits, spans)
            loss = (losses / answered.sum(0)).sum() / 2
        start, end = logits.unbind(-1)
        return ModelOutput(loss, logits, start_logits=start, end_logits=end)

    def _question(self, input_ids: Tensor) -> Tensor:
        separator: int = self.raw_config["sep_token_id"]
        found = input_ids == separator
        if not bool(found.any(1).all()):
            raise ValueError(
                f"a sequence has no separator (token {separator}), so the question's end is not "
                "known; give global_attention_mask"
            )
        # Before the first separator: nothing counted yet.
        return (found.cumsum(1) == 0).to(input_ids.dtype)
