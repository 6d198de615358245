"""Greedy and beam search for LED, token for token as transformers 5.23 does them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from haloformer.kernels.sharded import SequenceShard
from haloformer.model.beams import Beams
from haloformer.model.incremental import IncrementalDecoder
from haloformer.model.led import LedForConditionalGeneration


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        max_length: Most tokens of an answer, the start token included.
        min_length: An answer ends only after so many tokens, the start token included.
        num_beams: Hypotheses kept per example; 1 is greedy.
        length_penalty: Power of the length that a finished hypothesis' score is divided by.
        no_repeat_ngram_size: No n-gram of this size comes twice; 0 = may.
        early_stopping: Stop as soon as ``num_beams`` hypotheses are finished, though a running
            one might still become better.
        start_token: What the decoder reads first.
        eos_token: Ends an answer.
        pad_token: Fills up shorter answers.

    Raises:
        ValueError: If a number is out of range.
    """

    max_length: int = 142
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False
    start_token: int = 2
    eos_token: int = 2
    pad_token: int = 1

    def __post_init__(self) -> None:
        for name, low in (("max_length", 2), ("num_beams", 1), ("no_repeat_ngram_size", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} is less than {low}")
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length {self.min_length} is more than max_length {self.max_length}"
            )


@torch.no_grad()
def generate(
    model: LedForConditionalGeneration,
    input_ids: Int[Tensor, "b n"],
    shard: SequenceShard,
    settings: SearchSettings,
) -> Int[Tensor, "b t"]:
    """Answer a batch of sources.

    Args:
        model: LED; dropout is off.
        input_ids: [B, n] int64, this rank's rows of the source.
        shard: What the source is, with its global tokens, and which rows are here.
        settings: How to search.

    Returns:
        [B, T] int64 from the start token on, padded; the same on all ranks.
    """
    memory = model.encode(input_ids, shard, None)
    decoder = IncrementalDecoder(model, memory, shard, settings.num_beams, settings.max_length)
    if settings.num_beams == 1:
        return _greedy(decoder, settings, input_ids)
    return _beam_search(decoder, settings, input_ids)


def _greedy(
    decoder: IncrementalDecoder, settings: SearchSettings, input_ids: Tensor
) -> Int[Tensor, "b t"]:
    sequences = input_ids.new_full((input_ids.shape[0], 1), settings.start_token)
    running = torch.ones_like(sequences[:, 0], dtype=torch.bool)
    while bool(running.any()) and sequences.shape[1] < settings.max_length:
        scores = forbid(decoder.step(sequences[:, -1]).float(), sequences, settings)
        tokens = scores.argmax(-1).where(running, settings.pad_token)
        sequences = torch.cat([sequences, tokens[:, None]], dim=1)
        running = running & (tokens != settings.eos_token)
    return sequences


def _beam_search(
    decoder: IncrementalDecoder, settings: SearchSettings, input_ids: Tensor
) -> Int[Tensor, "b t"]:
    beams = Beams.start(
        input_ids.shape[0],
        settings.num_beams,
        settings.max_length,
        start_token=settings.start_token,
        pad_token=settings.pad_token,
        device=input_ids.device,
    )
    while beams.go_on(settings.early_stopping):
        so_far = beams.running_tokens()  # [B * K, length]
        scores = torch.log_softmax(decoder.step(so_far[:, -1]).float(), dim=-1)
        scores = forbid(scores, so_far, settings)
        parents = beams.advance(
            scores,
            eos_token=settings.eos_token,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
        )
        decoder.reorder(parents)
    return beams.best()


def forbid(
    scores: Float[Tensor, "r v"], sequences: Int[Tensor, "r t"], settings: SearchSettings
) -> Float[Tensor, "r v"]:
    """Give -inf to tokens that may not come next.

    Args:
        scores: [R, V] logits or log-probabilities of the next token.
        sequences: [R, T] tokens so far.
        settings: Names the n-gram size and the least length.
    """
    scores = scores.clone()
    if sequences.shape[1] < settings.min_length:
        scores[:, settings.eos_token] = -torch.inf
    size = settings.no_repeat_ngram_size
    if size > 0:
        for row, tokens in enumerate(sequences.tolist()):
            scores[row, repeats(tokens, size)] = -torch.inf
    return scores


def repeats(tokens: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram that is there already.

    ::

        size 2, tokens 5 6 7 5   ->   6, since 5 6 is there
    """
    prefix = tokens[len(tokens) - size + 1 :]
    return [
        tokens[end]
        for end in range(size - 1, len(tokens))
        if tokens[end - size + 1 : end] == prefix
    ]
