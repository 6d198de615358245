"""Other implementations of windowed attention, for the GPU benchmark to time beside ours.

Each maker takes a shape and a device, and returns a forward function and the tensors to
differentiate. What cannot import or run raises, and becomes a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Peer = tuple[Callable[[], Tensor], list[Tensor]]


def flex(shape: Any, device: str) -> Peer:
    """FlexAttention, compiled, with a block mask of the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    half, d = shape.window // 2, shape.dilation

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (j - i <= half * d) & (i - j <= half * d)
        return near & ((j - i) % d == 0) if d > 1 else near

    mask = create_block_mask(
        visible, None, None, shape.n, shape.n, device=device, _compile=device == "cuda"
    )
    attend = torch.compile(flex_attention, dynamic=False)
    query, key, value = (
        x.detach().transpose(1, 2).contiguous().requires_grad_() for x in shape.tensors(device)[:3]
    )
    return lambda: attend(query, key, value, block_mask=mask), [query, key, value]


def transformers_module(shape: Any, device: str) -> Peer:
    """LongformerSelfAttention of transformers: the whole module, projections included."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    width = shape.num_heads * shape.head_dim
    config = LongformerConfig(
        hidden_size=width,
        num_attention_heads=shape.num_heads,
        attention_window=[shape.window],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    module = LongformerSelfAttention(config, 0).to(device, shape.dtype)
    hidden = torch.randn(1, shape.n, width, device=device, dtype=shape.dtype, requires_grad=True)
    mask = torch.zeros(1, shape.n, device=device, dtype=shape.dtype)
    nothing = torch.zeros(1, shape.n, device=device, dtype=torch.bool)

    def forward() -> Tensor:
        return module(
            hidden,
            attention_mask=mask,
            is_index_masked=nothing,
            is_index_global_attn=nothing,
            is_global_attn=False,
        )[0]

    return forward, [hidden]


def flash(shape: Any, device: str) -> Peer:
    """flash_attn with its sliding window."""
    from flash_attn import flash_attn_func

    half = shape.window // 2
    query, key, value = shape.tensors(device)[:3]
    return lambda: flash_attn_func(query, key, value, window_size=(half, half)), [query, key, value]


def natten(shape: Any, device: str) -> Peer:
    """NATTEN's na1d; its windows shift at the ends where ours are cut."""
    from natten.functional import na1d

    query, key, value = shape.tensors(device)[:3]

    def forward() -> Tensor:
        return na1d(query, key, value, kernel_size=shape.window + 1, dilation=shape.dilation)

    return forward, [query, key, value]


PEERS = {
    "flex (compiled)": flex,
    "transformers module": transformers_module,
    "flash_attn": flash,
    "natten": natten,
}


def wanted(name: str, shape: Any) -> bool:
    """Whether a peer can be asked for a shape at all, and is worth its compile time there."""
    if shape.num_globals:
        return False
    if name == "flash_attn":
        return shape.dilation == 1 and shape.dtype != torch.float32
    if name == "natten":
        return shape.dtype != torch.float32
    if name == "transformers module":
        return shape.dilation == 1 and shape.n <= 16384 and shape.window in (32, 512)
    return shape.dtype != torch.float32 and (shape.window, shape.dilation) in (
        (512, 1),
        (128, 1),
        (2048, 1),
        (512, 2),
    )
