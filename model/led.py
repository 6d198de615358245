"""LED: a Longformer encoder and a full decoder for long documents and short answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from haloformer.configs.schema import LedConfig
from haloformer.kernels.hidden_dropout import hidden_dropout
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.decoder import DecoderLayer, TargetRows
from haloformer.model.dropout_sites import DropoutStep, Site
from haloformer.model.encoder import EncoderLayer
from haloformer.model.layers import padded_vocab, plain_embedding, vocab_embedding, vocab_logits
from haloformer.model.recompute import recomputed
from haloformer.model.targets import IGNORED_LABEL, Targets, as_targets
from haloformer.model.vocab_loss import token_loss


class Seq2SeqOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass.

    Attributes:
        loss_sum: [] at least fp32, cross-entropy in nats (with label smoothing, if the model has
            it) summed over this rank's target tokens.
        logits: [T, V] at those tokens, in row-major order; under tensor parallelism this rank's
            part of the vocabulary.
    """

    loss_sum: Tensor
    logits: Tensor


class PositionedEmbedding(nn.Module):
    """Adds learned positions 0, 1, 2, ... to token embeddings; LayerNorm, dropout.

    BART's table has two unused rows before position 0. They are left out here, as in
    transformers' LED.
    """

    def __init__(self, config: LedConfig, max_positions: int, layer: int) -> None:
        super().__init__()
        self.dropout, self.layer = config.hidden_dropout, layer
        self.positions = plain_embedding(
            max_positions, config.hidden_size, config.initializer_range
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        embedded: Float[Tensor, "b n e"],
        first_row: int,
        sample_ids: Int[Tensor, "b"],
        step: DropoutStep | None,
    ) -> Float[Tensor, "b n e"]:
        """[B, n, E] token embeddings of rows that start at ``first_row`` -> [B, n, E]."""
        limit = self.positions.num_embeddings
        if first_row + embedded.shape[1] > limit:
            raise ValueError(
                f"a sequence of {first_row + embedded.shape[1]} tokens is longer than the "
                f"{limit} positions of the model; shorten it"
            )
        places = torch.arange(first_row, first_row + embedded.shape[1], device=embedded.device)
        hidden: Tensor = self.norm(embedded + self.positions(places))
        if step is None:
            return hidden
        key = step.key(self.layer, Site.EMBEDDINGS)
        return hidden_dropout(hidden, self.dropout, key, sample_ids, first_row)


class LedEncoder(nn.Module):
    """Sliding-window and global attention over this rank's source rows."""

    def __init__(self, config: LedConfig, tensor_group: ProcessGroup | None) -> None:
        super().__init__()
        self.recompute = config.recompute
        section = config.encoder_section()
        self.embeddings = PositionedEmbedding(config, config.max_source_positions, layer=0)
        self.layers = nn.ModuleList(
            EncoderLayer(section, index, tensor_group) for index in range(config.encoder_layers)
        )

    def forward(
        self, embedded: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """[B, n, E] token embeddings of this rank's rows -> [B, n, E] hidden states."""
        hidden: Tensor = self.embeddings(embedded, shard.first_row, shard.sample_ids, step)
        for layer in self.layers:
            hidden = recomputed(self.recompute == "full", layer, hidden, shard, step)
        return hidden


class LedDecoder(nn.Module):
    """Decoder layers over this rank's target rows."""

    def __init__(self, config: LedConfig, tensor_group: ProcessGroup | None) -> None:
        super().__init__()
        self.recompute = config.recompute
        first = config.encoder_layers + 1  # dropout keys: after the encoder's layers
        self.embeddings = PositionedEmbedding(config, config.max_target_positions, layer=first)
        self.layers = nn.ModuleList(
            DecoderLayer(config, first + 1 + index, tensor_group)
            for index in range(config.decoder_layers)
        )

    def forward(
        self,
        embedded: Float[Tensor, "b t e"],
        memory: Float[Tensor, "b n e"],
        target: TargetRows,
        step: DropoutStep | None,
    ) -> Float[Tensor, "b t e"]:
        """[B, t, E] token embeddings and [B, n, E] encoder states of this rank -> [B, t, E]."""
        ids = target.shard.sample_ids
        hidden: Tensor = self.embeddings(embedded, target.first_row, ids, step)
        for layer in self.layers:
            hidden = recomputed(self.recompute == "full", layer, hidden, memory, target, step)
        return hidden


class LedForConditionalGeneration(nn.Module):
    """Encoder, decoder, and the tied embedding as output projection.

    Args:
        config: Sizes.
        vocab_size: Entries of the token embedding.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    final_logits_bias: Tensor

    def __init__(
        self, config: LedConfig, vocab_size: int, tensor_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.vocab_size, self.tensor_group = vocab_size, tensor_group
        self.label_smoothing = config.label_smoothing
        self.shared = vocab_embedding(
            vocab_size, config.hidden_size, config.initializer_range, tensor_group
        )
        self.encoder = LedEncoder(config, tensor_group)
        self.decoder = LedDecoder(config, tensor_group)
        # BART's constant per token; zero in every published LED, and never trained.
        rows = padded_vocab(vocab_size, tensor_group)
        rows = rows if tensor_group is None else rows // tensor_group.size()
        self.register_buffer("final_logits_bias", torch.zeros(rows))

    def encode(
        self, input_ids: Int[Tensor, "b n"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """[B, n] source tokens of this rank -> [B, n, E] hidden states."""
        memory: Tensor = self.encoder(self.shared(input_ids), shard, step)
        return memory

    def decode(
        self,
        decoder_input_ids: Int[Tensor, "b t"],
        memory: Float[Tensor, "b n e"],
        shard: SequenceShard,
        step: DropoutStep | None,
    ) -> Float[Tensor, "b t e"]:
        """[B, t] target tokens of this rank, shifted right -> [B, t, E] hidden states."""
        target = TargetRows(shard, decoder_input_ids.shape[1])
        hidden: Tensor = self.decoder(self.shared(decoder_input_ids), memory, target, step)
        return hidden

    def logits(self, hidden: Float[Tensor, "... e"]) -> Float[Tensor, "... v"]:
        """[..., E] decoder states -> [..., V], or this rank's part of the vocabulary."""
        weight: Tensor = self.shared.get_parameter("weight")
        # DeepSpeed casts parameters to bf16 and leaves buffers alone.
        bias = self.final_logits_bias.to(hidden.dtype)
        return vocab_logits(hidden, weight, bias, self.tensor_group)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        decoder_input_ids: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | Targets,
        shard: SequenceShard,
        step: DropoutStep | None = None,
    ) -> Seq2SeqOutput:
        """Predict this rank's target tokens.

        Context rank r of P holds target rows [r * T / P, (r + 1) * T / P); the collator pads the
        target to a multiple of P with label -100.

        Args:
            input_ids: [B, n] int64, this rank's rows of the source.
            decoder_input_ids: [B, t] int64, this rank's rows of the target, shifted right.
            labels: [B, t] int64, the true tokens, -100 on padding; or the same as ``Targets``,
                for which a GPU waits nowhere.
            shard: What the source sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.

        Returns:
            Loss summed over this rank's target tokens, and the logits there.
        """
        memory = self.encode(input_ids, shard, step)
        hidden = self.decode(decoder_input_ids, memory, shard, step)
        targets = as_targets(labels)
        logits = self.logits(targets.pick(hidden))
        losses = token_loss(
            logits, targets.tokens, self.vocab_size, self.tensor_group, self.label_smoothing
        )
        return Seq2SeqOutput(losses.sum(), logits)


def shift_right(labels: Int[Tensor, "b t"], start_token: int, pad_token: int) -> Int[Tensor, "b t"]:
    """What the decoder reads to predict the labels.

    ::

        labels     5 6 7 2 -100      start 2, padding 1
        returned   2 5 6 7 2

    Args:
        labels: [B, T] int64 of the whole target.
        start_token: First token that the decoder reads.
        pad_token: Stands for ignored labels.
    """
    first = labels.new_full((labels.shape[0], 1), start_token)
    shifted = torch.cat([first, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED_LABEL, pad_token)
