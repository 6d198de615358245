"""Longformer with a masked-language-model head."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.schema import ModelConfig
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.layers import plain_linear, vocab_bias, vocab_logits
from haloformer.model.targets import Targets, as_targets
from haloformer.model.vocab_loss import token_loss


class MaskedLmOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass.

    Attributes:
        loss_sum: [] fp32, cross-entropy in nats summed over this rank's masked positions.
        logits: [T, V] at those positions, in row-major order of the batch; under tensor
            parallelism this rank's part of the vocabulary.
    """

    loss_sum: Tensor
    logits: Tensor


class MaskedLmHead(nn.Module):
    """Dense, GELU, LayerNorm; the vocabulary projection is the tied embedding (RoBERTa)."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, tensor_group: ProcessGroup | None
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.tensor_group = tensor_group
        self.dense = plain_linear(size, size, config.initializer_range)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.bias = vocab_bias(vocab_size, tensor_group)

    def forward(
        self, hidden: Float[Tensor, "t e"], tied_weight: Float[Tensor, "v e"]
    ) -> Float[Tensor, "t v"]:
        """[T, E] hidden states, [V, E] embedding table -> [T, V] logits.

        Under tensor parallelism V is this rank's part of the vocabulary.
        """
        features = self.norm(functional.gelu(self.dense(hidden)))
        return vocab_logits(features, tied_weight, self.bias, self.tensor_group)


class LongformerForMaskedLM(nn.Module):
    """Encoder and MLM head over this rank's rows of the sequence.

    Args:
        config: Sizes of the model.
        vocab_size: Entries of the token embedding.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, tensor_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.vocab_size, self.tensor_group = vocab_size, tensor_group
        self.encoder = LongformerEncoder(config, vocab_size, tensor_group)
        self.head = MaskedLmHead(config, vocab_size, tensor_group)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        labels: Int[Tensor, "b n"] | Targets,
        shard: SequenceShard,
        step: DropoutStep | None = None,
        positions: Int[Tensor, "b n"] | None = None,
    ) -> MaskedLmOutput:
        """Predict the masked tokens of this rank's rows.

        Args:
            input_ids: [B, n] int64.
            labels: [B, n] int64, the true token at masked positions and -100 elsewhere; or the
                same as ``Targets``, for which a GPU waits nowhere.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing (evaluation).
            positions: [B, n] int64 rows of the position table; None counts the real tokens.

        Returns:
            Loss summed over this rank's targets, and the logits there. A rank without targets
            runs the same operations on zero rows: its loss is 0 and its graph is complete.
        """
        hidden = self.encoder(input_ids, shard, step, positions)
        targets = as_targets(labels)
        # Only masked rows get logits: 15 % of a [N, V] matrix that would dwarf the activations.
        rows = targets.pick(hidden)
        logits = self.head(rows, self.encoder.embeddings.word_embeddings.weight)
        losses = token_loss(logits, targets.tokens, self.vocab_size, self.tensor_group)
        loss_sum = losses.sum()
        return MaskedLmOutput(loss_sum, logits)
