"""Held-out text with the fixed masks of training's own evaluation, all of it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from haloformer.data_pipeline.batch import Batch
from haloformer.launcher.evaluators import Evaluator, Outcome, Work, summed
from haloformer.launcher.feeding import RankInput
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.targets import IGNORED_LABEL


class MaskedLmEvaluator(Evaluator):
    """Bits per character, nats per masked token, accuracy at masked places.

    Bits per character is what training logs: nats per masked token over ln 2 and over the
    characters that a token of this data set has on average.
    """

    unit: ClassVar[str] = "masked tokens"

    def evaluate(self, model: nn.Module, work: Work) -> Outcome:
        """Fill in every mask of the set, or of its first ``limit`` sequences."""
        assert isinstance(model, LongformerForMaskedLM)
        stream = work.open_stream()
        limit, place = work.settings["limit"], work.topology.data_rank
        totals = {"nats": 0.0, "targets": 0.0, "correct": 0.0}
        work.pace.begin("tokens", stream.index.num_tokens)
        for number, batch in enumerate(stream):
            assert isinstance(batch, Batch)
            sequence = number * work.topology.layout.data
            if limit is not None and sequence >= limit:
                break
            if limit is not None and sequence + place >= limit:
                batch.labels.fill(IGNORED_LABEL)
            for inputs in work.task.micro_batches(batch, 1, work.topology):
                output = model(*inputs, None)
                assert isinstance(inputs, RankInput)
                labels = inputs.labels.tokens
                vocab_size, group = model.vocab_size, model.tensor_group
                chosen = most_likely(output.logits, vocab_size, group)
                totals["nats"] += output.loss_sum.item()
                totals["targets"] += labels.numel()
                totals["correct"] += int((chosen == labels).sum())
            work.pace.advance(sum(span.stop - span.start for row in batch.spans for span in row))
        found = summed(totals, work)
        targets = max(found["targets"], 1.0)
        nats = found["nats"] / targets
        scores = {
            **work.task.rates(nats, stream.index.characters_per_token),
            "nats_per_token": nats,
            "accuracy": 100.0 * found["correct"] / targets,
        }
        return Outcome(int(found["targets"]), {"model": scores})


def most_likely(logits: Tensor, vocab_size: int, group: ProcessGroup | None) -> Tensor:
    """The token with the highest score, the first one among equals.

    Args:
        logits: [T, V] or, under tensor parallelism, [T, V' / ranks] of a padded vocabulary V'.
        vocab_size: V, without padding.
        group: Tensor-parallel group; None if the vocabulary is whole.

    Returns:
        [T] int64, the same on all tensor-parallel ranks.
    """
    first = 0 if group is None else group.rank() * logits.shape[1]
    real = max(0, min(vocab_size - first, logits.shape[1]))  # columns that are no padding
    top = logits.new_full((len(logits),), -torch.inf)
    tokens = torch.full_like(top, vocab_size, dtype=torch.int64)
    if real:
        top, tokens = logits[:, :real].max(1)
        tokens = tokens + first
    if group is None or not len(logits):
        return tokens
    best = top.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    tokens = tokens.where(top == best, vocab_size)
    dist.all_reduce(tokens, op=dist.ReduceOp.MIN, group=group)
    return tokens
