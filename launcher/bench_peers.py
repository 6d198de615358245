"""What ``haloformer bench attention`` times: our op, and other ways to the same attention.

Each contender gets the same query, key and value [1, N, H, D], or hidden states of the same size.
What a contender needs besides (masks, block masks) it makes at its first call, so that memory
measurements count it and timings, which run after a first call, do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haloformer.kernels import dispatch
from haloformer.kernels.band import Band
from haloformer.kernels.dispatch import WindowAttention
from haloformer.kernels.spec import WindowSpec


@dataclass(frozen=True)
class Shape:
    """One timed shape, batch 1, float32; the window is two-sided, as in configs."""

    n: int
    window: int
    num_heads: int
    head_dim: int
    dilation: int = 1
    num_globals: int = 0

    def band(self) -> Band:
        """The band of all heads."""
        spec = WindowSpec.from_two_sided(self.window, self.num_heads, dilation=self.dilation)
        return Band(spec, offset=0, valid=(0, self.n))

    def area(self) -> int:
        """Visible (row, key) pairs of one undilated head; windows are cut at the ends."""
        reach = min(self.window // 2, self.n - 1)
        return self.n * (2 * reach + 1) - reach * (reach + 1)

    def flops(self, *, backward: bool) -> float:
        """4 D per visible pair and head; the backward counts 2.5 times the forward."""
        forward = 4.0 * self.area() * self.head_dim * self.num_heads
        return forward * 3.5 if backward else forward

    def tensors(self) -> list[Tensor]:
        """Query, key, value [1, N, H, D], and with globals their key and value [1, G, H, D]."""
        rows = [self.n] * 3 + ([self.num_globals] * 2 if self.num_globals else [])
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(1, x, self.num_heads, self.head_dim, generator=generator).requires_grad_()
            for x in rows
        ]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        forward: One forward pass.
        inputs: What to differentiate, the output's own shape apart.
        backward: None, or why there is no backward to time.
        comparable: Whether its output is the attention of ``Shape.tensors``, [1, N, H, D].
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    backward: str | None = None
    comparable: bool = False


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


def ours(shape: Shape, attend: WindowAttention) -> Contender:
    """The band op of this package."""
    tensors, band = shape.tensors(), shape.band()
    query, key, value, *far = tensors
    global_key, global_value = far if far else (None, None)
    return Contender(
        lambda: attend(query, key, value, global_key, global_value, band)[0],
        tensors,
        comparable=True,
    )


def ours_with_projections(shape: Shape, attend: WindowAttention) -> Contender:
    """Three linears and the band op: what transformers' module does."""
    width = shape.num_heads * shape.head_dim
    linears = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
    hidden, band = torch.randn(1, shape.n, width, requires_grad=True), shape.band()

    def forward() -> Tensor:
        heads = (x(hidden).view(1, shape.n, shape.num_heads, -1) for x in linears)
        query, key, value = heads
        return attend(query, key, value, None, None, band)[0].flatten(2)

    return Contender(forward, [hidden, *linears.parameters()])


def dense(shape: Shape, attend: WindowAttention) -> Contender:
    """scaled_dot_product_attention over all N x N pairs, with the band as a mask."""
    tensors = shape.tensors()
    query, key, value = (x.transpose(1, 2) for x in tensors)

    @cache
    def mask() -> Tensor:
        full = torch.full((shape.n, shape.n), -torch.inf)
        # triu_ and tril_ would leave inf * 0; rows are cheap enough to fill one by one.
        for i in range(shape.n):
            full[i, max(0, i - shape.window // 2) : i + shape.window // 2 + 1] = 0.0
        return full

    def forward() -> Tensor:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask())
        return out.transpose(1, 2)

    return Contender(forward, tensors, comparable=True)


def flex(shape: Shape, attend: WindowAttention) -> Contender:
    """FlexAttention, compiled, with a block mask of the band; forward only on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    half = shape.window // 2

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j - i <= half) & (i - j <= half)

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    tensors = [x.detach() for x in shape.tensors()]
    query, key, value = (x.transpose(1, 2).contiguous() for x in tensors)

    @cache
    def mask() -> Any:
        return create_block_mask(visible, None, None, shape.n, shape.n, device="cpu")

    def forward() -> Tensor:
        out: Tensor = compiled(query, key, value, block_mask=mask())
        return out.transpose(1, 2)

    why = "FlexAttention has no backward on a CPU"
    return Contender(forward, tensors, backward=why, comparable=True)


def _longformer(shape: Shape) -> Any:
    try:
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
    except ImportError as error:
        raise UnavailableError("transformers is missing: pip install 'haloformer[hf]'") from error
    if shape.n % shape.window:
        raise UnavailableError(f"transformers needs N to be a multiple of {shape.window}")
    config = LongformerConfig(
        hidden_size=shape.num_heads * shape.head_dim,
        num_attention_heads=shape.num_heads,
        attention_window=[shape.window],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    return LongformerSelfAttention(config, 0)


def transformers_module(shape: Shape, attend: WindowAttention) -> Contender:
    """LongformerSelfAttention of transformers: projections, masks and attention."""
    module = _longformer(shape)
    hidden = torch.randn(1, shape.n, shape.num_heads * shape.head_dim, requires_grad=True)
    nothing = torch.zeros(1, shape.n, dtype=torch.bool)

    def forward() -> Tensor:
        out: Tensor = module(
            hidden,
            attention_mask=torch.zeros(1, shape.n),
            is_index_masked=nothing,
            is_index_global_attn=nothing,
            is_global_attn=False,
        )[0]
        return out

    used = [p for name, p in module.named_parameters() if "global" not in name]
    return Contender(forward, [hidden, *used])


def transformers_maths(shape: Shape, attend: WindowAttention) -> Contender:
    """The sliding chunks and the softmax of that module, without projections and padding masks."""
    module, tensors = _longformer(shape), shape.tensors()
    query, key, value = tensors

    def forward() -> Tensor:
        # Its own name for w/2.
        overlap = module.one_sided_attn_window_size
        scores = module._sliding_chunks_query_key_matmul(query * shape.head_dim**-0.5, key, overlap)
        weights = torch.softmax(scores, dim=-1)
        out: Tensor = module._sliding_chunks_matmul_attn_probs_value(weights, value, overlap)
        return out

    return Contender(forward, tensors, comparable=True)


Maker = Callable[[Shape, WindowAttention], Contender]
OURS = "haloformer"
MAKERS: dict[str, Maker] = {
    OURS: ours,
    "haloformer-module": ours_with_projections,
    "transformers-module": transformers_module,
    "transformers-maths": transformers_maths,
    "dense": dense,
    "flex": flex,
}

Part = Literal["fwd", "fwd_bwd"]


def run_once(contender: Contender, part: Part) -> Tensor:
    """One forward, without a graph, or one forward and backward; returns the output."""
    if part == "fwd":
        with torch.no_grad():
            return contender.forward()
    out = contender.forward()
    torch.autograd.grad(out, contender.inputs, torch.ones_like(out))
    return out.detach()


def named_backend(name: str, shape: Shape) -> WindowAttention:
    """The function behind a backend's name, for this shape.

    Raises:
        ValueError: If it is unknown or cannot run on a CPU.
    """
    query, key, *_ = shape.tensors()
    return dispatch.choose_backend(name, query, key, shape.band())
