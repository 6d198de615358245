"""Hidden states at chosen places of a sharded sequence, whole on every rank."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from haloformer.kernels.gather import gather_at
from haloformer.kernels.sharded import SequenceShard


def first_rows(hidden: Float[Tensor, "b n e"], shard: SequenceShard) -> Float[Tensor, "b e"]:
    """[B, E]: the hidden state of <s>, token 0, on every rank."""
    positions = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=hidden.device)
    return gather_at(hidden, positions, shard.ranks)[:, 0]


def counted_once(loss: Float[Tensor, ""], shard: SequenceShard) -> Float[Tensor, ""]:
    """A loss that every context rank computes alike, as this rank's share of the sum: on rank 0.

    A product, not a branch: the autograd graph has to be the same on every rank.
    """
    return loss * float(shard.rank == 0)


def whole_sequence(
    input_ids: Int[Tensor, "b n"],
    attention_mask: Tensor | None,
    global_attention_mask: Tensor | None,
) -> SequenceShard:
    """The shard of a caller that has the whole sequence and no process group.

    Args:
        input_ids: [B, N].
        attention_mask: [B, N], nonzero = a real token; None = all real.
        global_attention_mask: [B, N], nonzero = a global token; None = no global tokens.

    Raises:
        ValueError: If a mask has another shape than the ids.
    """
    num_batch, length = input_ids.shape
    for name, mask in (
        ("attention_mask", attention_mask),
        ("global_attention_mask", global_attention_mask),
    ):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} is {tuple(mask.shape)}, input_ids is {tuple(input_ids.shape)}; "
                "give a mask of the same shape"
            )
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
    chosen = torch.zeros_like(real)
    if global_attention_mask is not None:
        chosen = (global_attention_mask != 0) & real
    counts = chosen.sum(1)  # [B]
    most = int(counts.max())
    # A stable sort puts the global positions first, in order.
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)[:, :most]
    used = torch.arange(most, device=input_ids.device) < counts[:, None]
    return SequenceShard(
        group=None,
        rank=0,
        world_size=1,
        length=length,
        attention_mask=real,
        segment_ids=None,
        global_positions=order,
        global_mask=used,
        sample_ids=torch.arange(num_batch, device=input_ids.device),
    )
