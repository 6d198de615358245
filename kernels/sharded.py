"""A Longformer attention layer on a sequence that is spread over ranks.

::

    N=8, 2 ranks, left=right=1, token 0 global (g)
                   rank 0: g 1 2 3                    rank 1: 4 5 6 7
    halo           fetches 4                          fetches 3
    global keys    row g of K and V on both ranks
    band           rows 0-3 over g 1 2 3 4            rows 4-7 over g 3 4 5 6 7
    global row     part over keys 0-3       merge     part over keys 4-7
                   row 0 is overwritten

One rank alone takes the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from haloformer.kernels.band import Band
from haloformer.kernels.checks import check_projections, check_shape
from haloformer.kernels.dispatch import choose_kernel
from haloformer.kernels.dropout import AttentionDropout
from haloformer.kernels.global_tokens import (
    GlobalAttention,
    attend_globally,
    gather_rows_of,
    scatter_rows,
)
from haloformer.kernels.overlap import BandJob, EventTrace, overlapped_band
from haloformer.kernels.ranks import CommCounter
from haloformer.kernels.shard import SequenceShard
from haloformer.kernels.spec import WindowSpec

__all__ = [
    "AttentionDropoutSites",
    "CommCounter",
    "DropoutSite",
    "EventTrace",
    "SequenceShard",
    "global_attention",
    "sharded_attention",
    "sharded_band",
]


@dataclass(frozen=True)
class DropoutSite:
    """Dropout of one softmax of a layer.

    Attributes:
        rate: Probability of dropping, in [0, 1).
        key: Key of the site, from :func:`haloformer.kernels.dropout.fold_key`.
    """

    rate: float
    key: int


@dataclass(frozen=True)
class AttentionDropoutSites:
    """Dropout of a layer's two softmaxes.

    Attributes:
        band: That of the windowed rows.
        global_rows: That of the global rows.
    """

    band: DropoutSite
    global_rows: DropoutSite


def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_query: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    spec: WindowSpec,
    shard: SequenceShard,
    *,
    dropout: AttentionDropoutSites | None = None,
    first_head: int = 0,
    backend: str = "auto",
    counter: CommCounter | None = None,
    trace: EventTrace | None = None,
) -> Tensor:
    """Attend over the whole sequence from this rank's rows.

    Equal to :func:`haloformer.kernels.reference.longformer_attention` for any number of ranks,
    values and gradients; gradients of ``global_query`` are this rank's share, to be summed over
    the ranks like those of any weight.

    Args:
        query: [B, n, H, D] local projections of this rank's rows.
        key: [B, n, H, D].
        value: [B, n, H, D].
        global_query: [B, G, H, D] global projection of the rows that ``gather_global_rows`` gives.
        global_key: [B, n, H, D] global projections of this rank's rows.
        global_value: [B, n, H, D].
        spec: Window of each of the H heads.
        shard: The sequence and this rank's part of it.
        dropout: Dropout sites, or None for no dropout.
        first_head: Number, in the whole layer, of head 0 here: under tensor parallelism the heads
            are spread over ranks, and each drops what it would drop alone.
        backend: "auto", "chunks", "triton" or "loop".
        counter: Counts what this rank sends.
        trace: Records when the halo travels and when rows are computed.

    Returns:
        [B, n, H, D]; rows of padding are zero.

    Raises:
        ValueError: If shapes or dtypes disagree or the backend cannot run; on all ranks alike,
            before any communication.
    """
    _check(query, key, value, global_query, global_key, global_value, spec, shard)
    heads = range(first_head, first_head + spec.num_heads)
    # Before any communication, so that what cannot run stops all ranks alike.
    choose_kernel(backend, query, key, Band(spec, 0, (0, shard.num_rows)))
    _dropout(dropout.band if dropout else None, shard, heads)
    attention = global_attention(shard, dropout, heads, counter)
    global_rows = attend_globally(global_query, global_key, global_value, attention)
    return sharded_band(
        query,
        key,
        value,
        global_rows,
        spec,
        shard,
        dropout=dropout,
        first_head=first_head,
        backend=backend,
        counter=counter,
        trace=trace,
    )


def global_attention(
    shard: SequenceShard,
    dropout: AttentionDropoutSites | None,
    heads: Sequence[int],
    counter: CommCounter | None = None,
) -> GlobalAttention:
    """What answers the global rows of a layer.

    Args:
        shard: The sequence and this rank's part of it.
        dropout: The layer's dropout sites, or None.
        heads: Numbers, in the whole layer, of the heads that are here.
        counter: Counts what this rank sends.
    """
    return GlobalAttention(
        shard, _dropout(dropout.global_rows if dropout else None, shard, heads), counter
    )


def sharded_band(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_rows: Tensor,
    spec: WindowSpec,
    shard: SequenceShard,
    *,
    dropout: AttentionDropoutSites | None = None,
    first_head: int = 0,
    backend: str = "auto",
    counter: CommCounter | None = None,
    trace: EventTrace | None = None,
) -> Tensor:
    """:func:`sharded_attention` where the global rows are answered already.

    Args:
        query: [B, n, H, D] local projections of this rank's rows.
        key: [B, n, H, D].
        value: [B, n, H, D].
        global_rows: [B, G, H, D], the same on all ranks, from
            :func:`~haloformer.kernels.global_tokens.attend_globally` or
            :mod:`~haloformer.kernels.fold`.
        spec: As in :func:`sharded_attention`, like all that follow.
        shard: The sequence and this rank's part of it.
        dropout: Dropout sites; that of the global rows is not used here.
        first_head: Number, in the whole layer, of head 0 here.
        backend: "auto", "chunks", "triton" or "loop".
        counter: Counts what this rank sends.
        trace: Records when the halo travels and when rows are computed.

    Returns:
        [B, n, H, D]; rows of padding are zero.

    Raises:
        ValueError: As :func:`sharded_attention`.
    """
    rows = {"key": (key, shard.num_rows), "value": (value, shard.num_rows)}
    check_projections(spec, query, {**rows, "global_rows": (global_rows, shard.num_globals)})
    check_shape("query", query, (query.shape[0], shard.num_rows, *query.shape[2:]))
    check_shape("shard.sample_ids", shard.sample_ids, (query.shape[0],))
    kernel = choose_kernel(backend, query, key, Band(spec, 0, (0, shard.num_rows)))
    heads = range(first_head, first_head + spec.num_heads)
    band_dropout = _dropout(dropout.band if dropout else None, shard, heads)
    far_key, far_value = gather_rows_of([key, value], shard, counter)
    groups = []
    for channel, group in enumerate(spec.groups_by_reach()):
        q, k, v, g_k, g_v = (_take_heads(x, group) for x in (query, key, value, far_key, far_value))
        group_dropout = None
        if band_dropout is not None:
            group_dropout = replace(band_dropout, heads=tuple(heads[h] for h in group))
        job = BandJob(spec.select(group), shard, group_dropout, kernel, counter, trace, channel)
        groups.append((q, k, v, g_k, g_v, job, job.begin(k, v)))
    pieces = [overlapped_band(*group) for group in groups]
    return scatter_rows(_join_heads(pieces, spec), global_rows, shard)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_query: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    spec: WindowSpec,
    shard: SequenceShard,
) -> None:
    n = shard.num_rows
    check_projections(
        spec,
        query,
        {
            "query": (query, n),
            "key": (key, n),
            "value": (value, n),
            "global_query": (global_query, shard.num_globals),
            "global_key": (global_key, n),
            "global_value": (global_value, n),
        },
    )
    check_shape("shard.sample_ids", shard.sample_ids, (query.shape[0],))


def _dropout(
    site: DropoutSite | None, shard: SequenceShard, heads: Sequence[int]
) -> AttentionDropout | None:
    if site is None or site.rate == 0.0:
        return None
    return AttentionDropout(
        site.rate,
        site.key,
        shard.sample_ids,
        first_row=shard.first_row,
        global_columns=shard.global_positions,
        heads=tuple(heads),
    )


def _take_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of [B, N, H, D]; a view where they are neighbours."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return x[:, :, heads[0] : heads[-1] + 1]
    return x.index_select(2, torch.tensor(heads, device=x.device))


def _join_heads(pieces: list[Tensor], spec: WindowSpec) -> Tensor:
    """Put the groups' heads back in their order: [B, n, H, D]."""
    if len(pieces) == 1:
        return pieces[0]
    order = [head for group in spec.groups_by_reach() for head in group]
    joined = torch.cat(pieces, dim=2)
    if order == sorted(order):
        return joined
    places = [order.index(head) for head in range(len(order))]
    return joined.index_select(2, torch.tensor(places, device=joined.device))
