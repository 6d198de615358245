"""The book-keeping of beam search: running and finished hypotheses of every example.

::

    K=2, one step of one example, scores are sums of log-probabilities

    running    a -1.0   b -1.5
    candidates a</s> -1.2   ac -1.6   bd -1.9   b</s> -2.4      the best 2 K continuations
    finished   a</s> -1.2 / length^penalty                      ends among the best K only
    running    ac -1.6   bd -1.9                                the best K that have not ended
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Scores far below any log-probability: transformers adds it where something must not be chosen.
_NEVER = -1.0e9


@dataclass
class Beams:
    """K running and up to K finished hypotheses of each of B examples.

    Attributes:
        running: [B, K, L] int64 tokens, room for L.
        running_scores: [B, K] fp32 sums of log-probabilities.
        finished: [B, K, L] int64, best first.
        finished_scores: [B, K] fp32, divided by length ** penalty; far below zero where empty.
        finished_lengths: [B, K] int64, tokens of each, the start token included.
        is_finished: [B, K] bool, False = an empty slot.
        can_improve: [B, 1] bool, whether a running hypothesis could still enter.
        length: Tokens so far.
        is_full: Whether no candidate can go on.
    """

    running: Tensor
    running_scores: Tensor
    finished: Tensor
    finished_scores: Tensor
    finished_lengths: Tensor
    is_finished: Tensor
    can_improve: Tensor
    length: int = 1
    is_full: bool = False

    @classmethod
    def start(
        cls,
        num_examples: int,
        num_beams: int,
        max_length: int,
        *,
        start_token: int,
        pad_token: int,
        device: torch.device,
    ) -> Beams:
        """Hypotheses that hold the start token only."""
        shape = (num_examples, num_beams)
        tokens = torch.full((*shape, max_length), pad_token, dtype=torch.int64, device=device)
        tokens[:, :, 0] = start_token
        scores = torch.zeros(shape, device=device)
        scores[:, 1:] = _NEVER  # all beams are equal at first: only one may go on
        return cls(
            running=tokens,
            running_scores=scores,
            finished=tokens.clone(),
            finished_scores=torch.full(shape, _NEVER, device=device),
            finished_lengths=torch.ones(shape, dtype=torch.int64, device=device),
            is_finished=torch.zeros(shape, dtype=torch.bool, device=device),
            can_improve=torch.ones(num_examples, 1, dtype=torch.bool, device=device),
        )

    def running_tokens(self) -> Int[Tensor, "r t"]:
        """[B * K, length] tokens of the running hypotheses so far."""
        return self.running[:, :, : self.length].flatten(0, 1)

    def go_on(self, early_stopping: bool) -> bool:
        """Whether another step can change the outcome."""
        if early_stopping and bool(self.is_finished.all()):
            return False
        return bool(self.can_improve.any()) and not self.is_full

    def advance(
        self,
        scores: Float[Tensor, "r v"],
        *,
        eos_token: int,
        length_penalty: float,
        early_stopping: bool,
    ) -> Int[Tensor, "r"]:
        """Extend every running hypothesis by a token.

        Args:
            scores: [B * K, V] log-probabilities of the next token.
            eos_token: Ends a hypothesis.
            length_penalty: Power of the length that finished scores are divided by.
            early_stopping: Whether full slots of finished hypotheses take no others.

        Returns:
            [B * K] which old row each new running hypothesis continues.
        """
        num_examples, num_beams, room = self.running.shape
        vocab_size = scores.shape[-1]
        sums = scores.view(num_examples, num_beams, -1) + self.running_scores[..., None]
        # Twice as many as beams: if the best K all end here, K others can run on.
        top_scores, top = sums.flatten(1).topk(2 * num_beams)
        parents = top // vocab_size
        candidates = _pick(self.running, parents)
        candidates[:, :, self.length] = top % vocab_size
        ended = candidates[:, :, self.length] == eos_token
        if self.length + 1 >= room:
            ended = torch.ones_like(ended)
        kept_scores, kept = (top_scores + ended * _NEVER).topk(num_beams)
        self._finish(candidates, top_scores, ended, length_penalty, early_stopping)
        self.running, self.running_scores = _pick(candidates, kept), kept_scores
        self.length += 1
        self.is_full = bool(ended.all())
        self._check_improvement(length_penalty)
        first = torch.arange(num_examples, device=top.device)[:, None] * num_beams
        return (parents.gather(1, kept) + first).flatten()

    def _finish(
        self,
        candidates: Tensor,
        scores: Tensor,
        ended: Tensor,
        length_penalty: float,
        early_stopping: bool,
    ) -> None:
        """Let ended candidates among the best K into the finished, if they are better."""
        num_beams = self.running.shape[1]
        ended = ended.clone()
        ended[:, num_beams:] = False
        scores = scores / self.length**length_penalty
        if early_stopping:
            scores = scores + self.is_finished.all(-1, keepdim=True) * _NEVER
        scores = scores + ~self.can_improve * _NEVER + ~ended * _NEVER
        lengths = torch.full_like(ended, self.length + 1, dtype=torch.int64)
        self.finished_scores, best = torch.cat([self.finished_scores, scores], 1).topk(num_beams)
        self.finished = _pick(torch.cat([self.finished, candidates], 1), best)
        self.finished_lengths = torch.cat([self.finished_lengths, lengths], 1).gather(1, best)
        self.is_finished = torch.cat([self.is_finished, ended], 1).gather(1, best)

    def _check_improvement(self, length_penalty: float) -> None:
        """Could the best running hypothesis, were it to end now, beat the worst finished one?"""
        best = self.running_scores[:, :1] / (self.length - 1) ** length_penalty
        worst = self.finished_scores.amin(1, keepdim=True).where(self.is_finished, _NEVER)
        self.can_improve = self.can_improve & (best > worst).any(-1, keepdim=True)

    def best(self) -> Int[Tensor, "b t"]:
        """[B, T] the best finished hypothesis of each example, padded to the longest."""
        longest = int(self.finished_lengths[:, 0].max())
        return self.finished[:, 0, :longest]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, M, L] of [B, K, L] by [B, M] indices."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
