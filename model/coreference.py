"""Coreference by coarse-to-fine span ranking (Lee et al. 2018), over a sharded document.

    1. every span of up to L tokens gets a mention score from its first and last token
    2. the best spans of the whole document are kept, so many per token of it
    3. coarse: a bilinear score picks K likely antecedents of each
    4. fine: a small network scores those pairs; "no antecedent" scores 0

Step 1 is divided over the ranks (a span that starts here may end in the next rank's rows, so L - 1
rows are exchanged); from step 2 on there are M rows, which every rank has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from haloformer.configs.models import NUM_DISTANCES, CorefConfig
from haloformer.kernels.gather import gather_at, gather_rows, with_following_rows
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.encoder import LongformerEncoder
from haloformer.model.layers import plain_embedding, plain_linear
from haloformer.model.rows import counted_once


class CorefOutput(NamedTuple):
    """What one rank knows of a batch after a forward pass; the same on all but for the loss.

    Attributes:
        loss_sum: [] at least fp32, summed over kept spans; counted on context rank 0, else zero.
        spans: [B, M, 2] int64 first and last token of the kept spans, in order of the text.
        span_mask: [B, M] bool, False = there were fewer spans.
        antecedents: [B, M, K] int64 numbers of the spans that may come before.
        scores: [B, M, 1 + K]; column 0 is "no antecedent".
    """

    loss_sum: Tensor
    spans: Tensor
    span_mask: Tensor
    antecedents: Tensor
    scores: Tensor


class CorefHead(nn.Module):
    """Mention scores, coarse and fine antecedent scores."""

    def __init__(self, config: CorefConfig) -> None:
        super().__init__()
        size, std = config.hidden_size, config.initializer_range
        self.max_width, self.num_antecedents = config.max_span_width, config.num_antecedents
        self.start = plain_linear(size, size, std)
        self.end = plain_linear(size, size, std)
        self.start_score = plain_linear(size, 1, std)
        self.end_score = plain_linear(size, 1, std)
        self.coarse = plain_linear(2 * size, 2 * size, std)
        self.distance = plain_embedding(NUM_DISTANCES, size, std)
        self.inner = plain_linear(7 * size, size, std)
        self.output = plain_linear(size, 1, std)

    def mention_scores(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard
    ) -> Float[Tensor, "b n l"]:
        """Score of every span that starts in this rank's rows, by its width less 1.

        Spans that leave the text get -inf.
        """
        rows, width = hidden.shape[1], self.max_width
        start = functional.gelu(self.start(hidden))
        end = functional.gelu(self.end(hidden))
        ends = torch.cat([end, self.end_score(end)], dim=-1)
        ends = with_following_rows(ends, width - 1, shard.ranks)
        real = shard.with_halo(shard.attention_mask, 0, width - 1)
        scores = []
        for step in range(width):
            reached = ends[:, step : step + rows]
            pair = (start * reached[..., :-1]).sum(-1) * start.shape[-1] ** -0.5
            score = self.start_score(start)[..., 0] + reached[..., -1] + pair
            inside = real[:, :rows] & real[:, step : step + rows]
            scores.append(score.masked_fill(~inside, -torch.inf))
        return torch.stack(scores, dim=-1)

    def antecedent_scores(
        self,
        spans: Float[Tensor, "b m d"],
        mentions: Float[Tensor, "b m"],
        mask: Bool[Tensor, "b m"],
    ) -> tuple[Int[Tensor, "b m k"], Float[Tensor, "b m k"]]:
        """The likely antecedents of every span, and their scores (-inf where there is none).

        Args:
            spans: [B, M, 2 E] states of first and last token, in order of the text.
            mentions: [B, M] mention scores, 0 in unused slots.
            mask: [B, M], False = an unused slot.
        """
        num_spans = spans.shape[1]
        coarse = self.coarse(spans) @ spans.mT * spans.shape[-1] ** -0.5
        coarse = coarse + mentions[:, :, None] + mentions[:, None]
        before = torch.ones(num_spans, num_spans, dtype=torch.bool, device=spans.device).tril(-1)
        allowed = before & mask[:, None] & mask[:, :, None]
        coarse = coarse.masked_fill(~allowed, -torch.inf)
        scores, chosen = coarse.topk(min(self.num_antecedents, num_spans), dim=-1)
        return chosen, scores + self._fine(spans, chosen)

    def _fine(
        self, spans: Float[Tensor, "b m d"], chosen: Int[Tensor, "b m k"]
    ) -> Float[Tensor, "b m k"]:
        examples = torch.arange(spans.shape[0], device=spans.device)[:, None, None]
        other = spans[examples, chosen]  # [B, M, K, 2 E]
        own = spans[:, :, None].expand_as(other)
        numbers = torch.arange(spans.shape[1], device=spans.device)[:, None]
        # Pairs that are not allowed may point ahead; their scores are -inf already.
        gap = (numbers - chosen).clamp(min=1)
        bucket = torch.log2(gap.to(torch.float32)).long().clamp(max=NUM_DISTANCES - 1)
        pair = torch.cat([own, other, own * other, self.distance(bucket)], dim=-1)
        scores: Tensor = self.output(functional.gelu(self.inner(pair)))
        return scores[..., 0]


class LongformerForCoreference(nn.Module):
    """Encoder and coreference head.

    Args:
        config: Sizes of encoder and head.
        vocab_size: Entries of the token embedding.
        tensor_group: Tensor-parallel group, None for plain torch layers.
    """

    def __init__(
        self, config: CorefConfig, vocab_size: int, tensor_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.top_span_ratio = config.top_span_ratio
        self.encoder = LongformerEncoder(config, vocab_size, tensor_group)
        self.head = CorefHead(config)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        labels: Int[Tensor, "b s 3"],
        shard: SequenceShard,
        step: DropoutStep | None = None,
    ) -> CorefOutput:
        """Rank antecedents.

        Args:
            input_ids: [B, n] int64, this rank's rows.
            labels: [B, S, 3] int64 gold mentions, the same on all ranks: first token, last token,
                number of the cluster; -1 fills up.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.
        """
        hidden = self.encoder(input_ids, shard, step)
        scores = gather_rows(self.head.mention_scores(hidden, shard), shard.ranks)  # [B, N, L]
        kept, mask = best_spans(scores.detach(), shard.attention_mask, self.top_span_ratio)
        width = scores.shape[-1]
        mentions = scores.flatten(1).gather(1, kept)
        first = (kept // width).where(mask, 0)
        last = (kept // width + kept % width).where(mask, 0)
        both = gather_at(hidden, torch.cat([first, last], dim=1), shard.ranks)
        states = torch.cat([both[:, : kept.shape[1]], both[:, kept.shape[1] :]], dim=-1)
        mentions = mentions.masked_fill(~mask, 0.0)
        antecedents, ranked = self.head.antecedent_scores(states, mentions, mask)
        ranked = ranked if ranked.dtype == torch.float64 else ranked.float()
        ranked = functional.pad(ranked, (1, 0), value=0.0)  # "no antecedent"
        spans = torch.stack([first, last], dim=-1)
        loss = antecedent_loss(ranked, antecedents, gold_clusters(spans, mask, labels))
        loss = (loss * mask).sum()
        return CorefOutput(counted_once(loss, shard), spans, mask, antecedents, ranked)


def best_spans(
    scores: Float[Tensor, "b n l"], attention_mask: Bool[Tensor, "b n"], ratio: float
) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]:
    """The spans that are kept, in order of the text.

    How many depends on a document's own tokens, not on the padding beside it.

    Args:
        scores: [B, N, L] by first token and width less 1, -inf where there is no such span.
        attention_mask: [B, N], False = padding.
        ratio: Spans kept per token.

    Returns:
        [B, M] first token * L + width less 1, unused slots last; and [B, M], False = unused.
    """
    flat = scores.flatten(1)
    num_slots = min(max(int(ratio * scores.shape[1]), 1), flat.shape[1])
    best, places = flat.topk(num_slots, dim=1)
    quota = (attention_mask.sum(1).double() * ratio).long().clamp(min=1)  # [B]
    used = torch.arange(num_slots, device=flat.device) < quota[:, None]
    used = used & (best > -torch.inf)
    order = places.masked_fill(~used, flat.shape[1]).argsort(dim=1)
    return places.gather(1, order), used.gather(1, order)


def gold_clusters(
    spans: Int[Tensor, "b m 2"], mask: Bool[Tensor, "b m"], labels: Int[Tensor, "b s 3"]
) -> Int[Tensor, "b m"]:
    """[B, M] number of the cluster of each kept span, -1 if it is no gold mention."""
    same = (spans[:, :, None] == labels[:, None, :, :2]).all(-1)  # [B, M, S]
    same = same & mask[..., None] & (labels[:, None, :, 0] >= 0)
    numbers = labels[:, None, :, 2].expand_as(same).masked_fill(~same, -1)
    return functional.pad(numbers, (1, 0), value=-1).amax(-1)


def antecedent_loss(
    scores: Float[Tensor, "b m k+1"],
    antecedents: Int[Tensor, "b m k"],
    clusters: Int[Tensor, "b m"],
) -> Float[Tensor, "b m"]:
    """Negative log of the probability of any right antecedent, or of none if there is none.

    Args:
        scores: [B, M, 1 + K], column 0 for "no antecedent", -inf where there is no pair.
        antecedents: [B, M, K] numbers of spans.
        clusters: [B, M] from :func:`gold_clusters`.
    """
    num_batch, num_spans, _ = antecedents.shape
    theirs = clusters.gather(1, antecedents.flatten(1)).view(num_batch, num_spans, -1)
    right = (theirs == clusters[..., None]) & (clusters[..., None] >= 0)
    right = right & (scores[..., 1:] > -torch.inf)
    none = ~right.any(-1, keepdim=True)
    right = torch.cat([none, right], dim=-1)
    return scores.logsumexp(-1) - scores.masked_fill(~right, -torch.inf).logsumexp(-1)


def predicted_clusters(output: CorefOutput) -> list[list[list[tuple[int, int]]]]:
    """Per example the clusters of at least two spans, each span as (first, last) token."""
    best = output.scores.argmax(-1)
    examples = []
    for b in range(best.shape[0]):
        clusters: list[list[tuple[int, int]]] = []
        member: dict[int, int] = {}  # span -> cluster
        for m in output.span_mask[b].nonzero().flatten().tolist():
            span = tuple(output.spans[b, m].tolist())
            if best[b, m] == 0:
                member[m] = len(clusters)
                clusters.append([span])
            else:
                member[m] = member[int(output.antecedents[b, m, best[b, m] - 1])]
                clusters[member[m]].append(span)
        examples.append([cluster for cluster in clusters if len(cluster) > 1])
    return examples
