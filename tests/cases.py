"""The one table of shapes that every implementation of the attention is held to.

``LayerCase`` is a whole attention layer on whole sequences (what the sharded op computes);
``BandCase`` is one call of a backend (what chunks and Triton compute). Each has explicit named
cases and a seeded random generator, and builds its own inputs in float64, rounded where asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from haloformer.kernels import reference
from haloformer.kernels.band import Band
from haloformer.kernels.dropout import AttentionDropout, fold_key
from haloformer.kernels.shard import SequenceShard
from haloformer.kernels.sharded import AttentionDropoutSites, DropoutSite
from haloformer.kernels.spec import WindowSpec

WORLD_SIZES = (1, 2, 3, 4)
BAND_KEY, GLOBAL_KEY = fold_key(1, 2, 3, 0), fold_key(1, 2, 3, 1)


@dataclass(frozen=True)
class LayerCase:
    """A layer: one entry per head in the window tuples, one per example in the others."""

    name: str
    length: int
    left: tuple[int, ...]
    right: tuple[int, ...]
    dilation: tuple[int, ...]
    globals_: tuple[tuple[int, ...], ...] = ((),)
    padding: tuple[tuple[int, ...], ...] = ((),)
    documents: tuple[tuple[int, ...], ...] | None = None  # lengths of packed documents
    dropout: float = 0.0
    head_dim: int = 3
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def world_sizes(self) -> tuple[int, ...]:
        return tuple(p for p in WORLD_SIZES if self.length % p == 0)

    @property
    def spec(self) -> WindowSpec:
        return WindowSpec(self.left, self.right, self.dilation)

    def tensors(self) -> list[Tensor]:
        """Query, key, value [B, N, H, D], then global query [B, G, H, D], key, value; then dO."""
        generator = torch.Generator().manual_seed(self.seed)
        num_batch, num_heads = len(self.globals_), len(self.left)
        num_globals = max(len(x) for x in self.globals_)
        rows = [self.length] * 3 + [num_globals] + [self.length] * 3
        return [
            torch.randn(
                num_batch, n, num_heads, self.head_dim, dtype=torch.float64, generator=generator
            )
            for n in rows
        ]

    def shard(self, group=None, rank=0, world_size=1) -> SequenceShard:
        num_batch = len(self.globals_)
        num_globals = max(len(x) for x in self.globals_)
        attention_mask = torch.ones(num_batch, self.length, dtype=torch.bool)
        for example, places in enumerate(self.padding):
            attention_mask[example, list(places)] = False
        # Unused slots hold places that would do harm if they were used.
        positions = torch.full((num_batch, num_globals), self.length // 2)
        global_mask = torch.zeros(num_batch, num_globals, dtype=torch.bool)
        for example, places in enumerate(self.globals_):
            positions[example, : len(places)] = torch.tensor(places, dtype=torch.int64)
            global_mask[example, : len(places)] = True
        segments = None
        if self.documents is not None:
            segments = torch.stack(
                [
                    torch.repeat_interleave(torch.arange(len(x)), torch.tensor(x))
                    for x in self.documents
                ]
            )
        return SequenceShard(
            group=group,
            rank=rank,
            world_size=world_size,
            length=self.length,
            attention_mask=attention_mask,
            segment_ids=segments,
            global_positions=positions,
            global_mask=global_mask,
            sample_ids=torch.arange(num_batch) + 5,
        )

    def sites(self) -> AttentionDropoutSites | None:
        if self.dropout == 0.0:
            return None
        return AttentionDropoutSites(
            DropoutSite(self.dropout, BAND_KEY), DropoutSite(self.dropout, GLOBAL_KEY)
        )

    def truth(self) -> list[Tensor]:
        """Output and the six gradients of the whole layer, by the reference in float64."""
        *inputs, grad_out = self.tensors()
        for x in inputs:
            x.requires_grad_()
        shard = self.shard()
        dropouts = [
            AttentionDropout(
                self.dropout,
                key,
                shard.sample_ids,
                global_columns=shard.global_positions,
            )
            if self.dropout
            else None
            for key in (BAND_KEY, GLOBAL_KEY)
        ]
        out = reference.longformer_attention(
            *inputs,
            self.spec,
            attention_mask=shard.attention_mask,
            segment_ids=shard.segment_ids,
            global_positions=shard.global_positions,
            global_mask=shard.global_mask,
            band_dropout=dropouts[0],
            global_dropout=dropouts[1],
        )
        return [out.detach(), *gradients(out, inputs, grad_out)]


def gradients(out: Tensor, inputs: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all inputs, zeros where the output does not depend on one."""
    if not out.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(
        out, inputs, grad_out.to(out.dtype), allow_unused=True, materialize_grads=True
    )


LAYER_CASES = (
    LayerCase("window 2", 12, (1, 1), (1, 1), (1, 1)),
    LayerCase("one token per rank", 4, (1, 2), (2, 1), (1, 1), ((0,),)),
    LayerCase("causal", 12, (3, 5), (0, 0), (1, 1), ((0,),)),
    LayerCase("wider than two shards", 12, (8, 11), (9, 7), (1, 1), ((5,),)),
    LayerCase("wider than the sequence", 12, (40,), (40,), (1,), ((1, 11),)),
    LayerCase("dilation 1, 2, 3 mixed", 24, (4, 2, 1, 4), (4, 2, 1, 4), (1, 2, 3, 1), ((0,),)),
    LayerCase("dilated and causal", 12, (2, 2), (0, 0), (3, 2), ((7,),)),
    LayerCase("causal and symmetric heads", 12, (2, 2, 2), (0, 2, 0), (1, 1, 2), ((3,),)),
    LayerCase("only itself", 12, (0, 0), (0, 0), (1, 2), ((4,),)),
    LayerCase("no globals", 12, (2, 3), (2, 3), (1, 1), ((), ())),
    LayerCase("globals in one example only", 12, (2,), (2,), (1,), ((), (2, 9))),
    LayerCase("two globals on one rank", 12, (2,), (1,), (1,), ((10, 9),)),
    LayerCase("five globals, any order", 24, (2, 1), (2, 1), (1, 2), ((17, 0, 5, 23, 6), (11,))),
    LayerCase("every token global", 4, (1,), (1,), (1,), ((2, 0, 3, 1),)),
    LayerCase("ragged lengths", 24, (3,), (3,), (1,), ((0,), (0,)), ((), tuple(range(13, 24)))),
    LayerCase("a rank of padding", 12, (2,), (2,), (1,), ((0,),), (tuple(range(3, 12)),)),
    LayerCase("nothing but padding", 12, (2,), (2,), (1,), ((), (3,)), (tuple(range(12)), ())),
    LayerCase("padding inside", 12, (2, 1), (2, 1), (1, 2), ((6,),), ((0, 3, 4, 5, 7),)),
    LayerCase("packed", 24, (5,), (5,), (1,), ((0, 9),), ((23,),), ((9, 11, 4),)),
    LayerCase(
        "packed, dilated, dropout",
        24,
        (3, 3),
        (3, 0),
        (2, 3),
        ((0, 9), (5,)),
        ((23,), ()),
        ((9, 11, 4), (24,)),
        dropout=0.3,
    ),
    LayerCase("dropout", 24, (4, 2), (4, 2), (1, 2), ((7,), ()), dropout=0.5),
    LayerCase("dropout with heads out of order", 12, (1, 3, 1), (1, 3, 1), (1, 1, 1), dropout=0.2),
)


def random_layer_case(seed: int) -> LayerCase:
    """A layer drawn from all that the issue lists; the same for the same seed."""
    rng = random.Random(seed)
    world_size = 1 + seed % 4
    length = world_size * rng.randint(1, 24 // world_size)
    num_batch, num_heads = rng.choice((1, 2, 2)), rng.randint(1, 4)
    causal = rng.random() < 0.3
    widest = rng.choice((1, 2, 5, 2 * length // world_size + 2))
    left = tuple(rng.randint(1, widest) for _ in range(num_heads))
    globals_, padding, documents = [], [], []
    for _ in range(num_batch):
        padded = set()
        if rng.random() < 0.5:
            padded |= set(range(rng.randint(0, length), length))
        if rng.random() < 0.2:
            padded |= set(rng.sample(range(length), rng.randint(0, length)))
        real = [i for i in range(length) if i not in padded]
        globals_.append(tuple(rng.sample(real, min(len(real), rng.choice((0, 0, 1, 1, 2, 5))))))
        padding.append(tuple(sorted(padded)))
        cuts = sorted(rng.sample(range(length + 1), min(2, length)))
        documents.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)))
    return LayerCase(
        name=f"seed {seed}",
        length=length,
        left=left,
        right=tuple(0 if causal else rng.choice((x, rng.randint(0, widest))) for x in left),
        dilation=tuple(rng.choice((1, 1, 2, 3)) for _ in left),
        globals_=tuple(globals_),
        padding=tuple(padding),
        documents=tuple(documents) if rng.random() < 0.3 else None,
        dropout=rng.choice((0.0, 0.0, 0.1, 0.6)),
        head_dim=rng.choice((1, 2, 5)),
        seed=seed,
    )


@dataclass(frozen=True)
class BandCase:
    """One call of a backend: n rows in a buffer with a halo on either side."""

    name: str
    n: int
    left: tuple[int, ...]
    right: tuple[int, ...]
    dilation: tuple[int, ...]
    head_dim: int = 8
    num_batch: int = 1
    halo: tuple[int, int] = (0, 0)
    missing: tuple[int, int] = (0, 0)  # halo rows beyond the ends of the sequence
    num_globals: int = 0
    masked: float = 0.0  # share of keys, and of global keys, that are masked out
    segments: bool = False
    global_segments: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """Query [B, n, H, D], key, value [B, m, H, D], global key, value [B, G, H, D] or None, dO.

        Values are rounded to ``dtype`` and returned in it.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def draw(rows: int) -> Tensor:
            shape = (self.num_batch, rows, len(self.left), self.head_dim)
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

        m = self.n + sum(self.halo)
        found: list[Tensor | None] = [draw(self.n), draw(m), draw(m)]
        found += (
            [draw(self.num_globals), draw(self.num_globals)] if self.num_globals else [None] * 2
        )
        return [*found, draw(self.n)]

    def band(self) -> Band:
        generator = torch.Generator().manual_seed(self.seed + 1)
        num_batch, g = self.num_batch, self.num_globals
        m = self.n + sum(self.halo)

        def mask(rows: int) -> Tensor:
            return torch.rand(num_batch, rows, generator=generator) >= self.masked

        key_segments = None
        if self.segments:
            starts = torch.rand(num_batch, m, generator=generator) < 0.2
            key_segments = starts.cumsum(1)
        dropout = None
        first_row = self.halo[0] + 7
        if self.dropout:
            columns = torch.randint(0, 1000, (num_batch, g), generator=generator) if g else None
            ids = torch.arange(num_batch) * (1 << 33) + 3
            dropout = AttentionDropout(self.dropout, BAND_KEY, ids, first_row, columns)
        far = None
        if self.global_segments:
            far = torch.randint(0, 4, (num_batch, g), generator=generator)
        here = slice(self.halo[0], self.halo[0] + self.n)
        return Band(
            WindowSpec(self.left, self.right, self.dilation),
            offset=self.halo[0],
            valid=(self.missing[0], m - self.missing[1]),
            key_mask=mask(m) if self.masked else None,
            query_segments=None if key_segments is None else key_segments[:, here].contiguous(),
            key_segments=key_segments,
            global_mask=mask(g) if self.masked and g else None,
            global_segments=far,
            dropout=dropout,
        )

    def run(self, backend, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Output, log-sum-exp and the gradients of the three or five inputs."""
        *inputs, grad_out = self.tensors(dtype)
        used = [x.requires_grad_() for x in inputs if x is not None]
        out, lse = backend(*inputs, self.band())
        return [out.detach(), lse, *gradients(out, used, grad_out)]


def truth_of_band(case: BandCase, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What ``case.run`` must give: the reference in float64 on inputs rounded to ``dtype``."""

    def backend(*operands):
        *inputs, band = operands
        return reference.window_attention(
            *(None if x is None else x.double() for x in inputs), band
        )

    return case.run(backend, dtype)


BAND_CASES = (
    BandCase("window 2", 40, (1, 1), (1, 1), (1, 1)),
    BandCase("one row", 1, (3,), (3,), (1,)),
    BandCase("only itself", 9, (0,), (0,), (2,)),
    BandCase("causal", 70, (9, 30), (0, 0), (1, 1), num_batch=2),
    BandCase("uneven sides", 70, (9, 2), (1, 20), (1, 1)),
    BandCase("wider than the sequence", 33, (100,), (100,), (1,)),
    BandCase("several blocks", 150, (20,), (20,), (1,), head_dim=16),
    BandCase("dilation 3 of 70 rows", 70, (4, 4), (4, 4), (3, 3)),
    BandCase("mixed heads", 50, (4, 2, 4, 7), (4, 2, 0, 7), (1, 2, 3, 1)),
    BandCase("halo on both sides", 30, (8, 4), (6, 3), (1, 2), halo=(8, 6)),
    BandCase("halo cut by the ends", 30, (8, 4), (6, 3), (1, 2), halo=(8, 6), missing=(8, 2)),
    BandCase("offset not a multiple of the dilation", 31, (3,), (2,), (3,), halo=(10, 7)),
    BandCase("keys masked", 40, (5, 2), (5, 2), (1, 2), num_batch=2, masked=0.4),
    BandCase("all keys masked", 20, (5,), (5,), (1,), masked=1.0),
    BandCase("one global", 40, (5,), (5,), (1,), num_globals=1),
    BandCase("17 globals", 40, (5, 3), (5, 3), (1, 2), num_globals=17, masked=0.3, num_batch=2),
    BandCase("globals alone", 9, (5,), (5,), (1,), num_globals=3, halo=(9, 0), missing=(18, 0)),
    BandCase("segments", 60, (9, 4), (9, 4), (1, 2), segments=True, num_batch=2),
    BandCase(
        "segments and globals",
        60,
        (9, 4),
        (9, 4),
        (1, 2),
        segments=True,
        global_segments=True,
        num_globals=5,
        masked=0.2,
    ),
    BandCase("dropout", 60, (9, 4), (9, 4), (1, 2), dropout=0.3, num_batch=2),
    BandCase(
        "everything",
        70,
        (9, 4, 6),
        (9, 0, 6),
        (1, 2, 3),
        halo=(19, 18),
        missing=(5, 0),
        num_globals=4,
        masked=0.2,
        segments=True,
        dropout=0.25,
        num_batch=2,
    ),
    BandCase("head dim 1", 20, (3,), (3,), (1,), head_dim=1),
    BandCase("head dim 80", 40, (7,), (7,), (1,), head_dim=80),
)


def random_band_case(seed: int) -> BandCase:
    """A band drawn from everything a backend must handle; the same for the same seed."""
    rng = random.Random(seed)
    num_heads = rng.randint(1, 3)
    n = rng.choice((1, 5, 17, 40, 66))
    halo = (rng.choice((0, 3, 20)), rng.choice((0, 3, 20)))
    widths = (0, 1, 2, 6, 15, 80)
    num_globals = rng.choice((0, 0, 1, 3))
    segments = rng.random() < 0.3
    return BandCase(
        name=f"seed {seed}",
        n=n,
        left=tuple(rng.choice(widths) for _ in range(num_heads)),
        right=tuple(rng.choice((0, rng.choice(widths))) for _ in range(num_heads)),
        dilation=tuple(rng.choice((1, 1, 2, 3)) for _ in range(num_heads)),
        head_dim=rng.choice((2, 8, 16)),
        num_batch=rng.randint(1, 2),
        halo=halo,
        missing=(rng.randint(0, halo[0]), rng.randint(0, halo[1])),
        num_globals=num_globals,
        masked=rng.choice((0.0, 0.3, 0.9)),
        segments=segments,
        global_segments=segments and num_globals > 0 and rng.random() < 0.5,
        dropout=rng.choice((0.0, 0.0, 0.4)),
        seed=seed,
    )
