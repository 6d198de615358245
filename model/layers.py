"""The linears and embeddings of every model: plain torch, or megatron-core's under tensor parallel.

Parameter names and initial values are the same either way, so a model built without a tensor
group works in any training loop, with no process group and no megatron import.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

Initializer = Callable[[Tensor], Tensor]


def normal_initializer(std: float) -> Initializer:
    """Fill a tensor from N(0, std)."""

    def fill(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, mean=0.0, std=std)

    return fill


def column_linear(
    in_features: int, out_features: int, std: float, tensor_group: ProcessGroup | None
) -> nn.Module:
    """A linear whose output features are split over the tensor-parallel ranks.

    Args:
        in_features: Features of the input, whole on every rank.
        out_features: Features of the output over all ranks.
        std: Standard deviation of the initial weight; the bias starts at zero.
        tensor_group: Tensor-parallel group; None gives ``nn.Linear``.

    Returns:
        A module ``[..., in_features] -> [..., out_features / tensor ranks]``.
    """
    if tensor_group is None:
        return plain_linear(in_features, out_features, std)
    from haloformer.model.megatron_layers import ColumnLinear

    return ColumnLinear(in_features, out_features, normal_initializer(std), tensor_group)


def row_linear(
    in_features: int, out_features: int, std: float, tensor_group: ProcessGroup | None
) -> nn.Module:
    """A linear whose input features are split over the tensor-parallel ranks.

    Args:
        in_features: Features of the input over all ranks.
        out_features: Features of the output, whole on every rank.
        std: Standard deviation of the initial weight; the bias starts at zero.
        tensor_group: Tensor-parallel group; None gives ``nn.Linear``.

    Returns:
        A module ``[..., in_features / tensor ranks] -> [..., out_features]``.
    """
    if tensor_group is None:
        return plain_linear(in_features, out_features, std)
    from haloformer.model.megatron_layers import RowLinear

    return RowLinear(in_features, out_features, normal_initializer(std), tensor_group)


def vocab_embedding(
    num_embeddings: int, embedding_dim: int, std: float, tensor_group: ProcessGroup | None
) -> nn.Module:
    """A token embedding whose vocabulary is split over the tensor-parallel ranks.

    Returns:
        A module ``int64 [...] -> [..., embedding_dim]``, whole on every rank.
    """
    if tensor_group is None:
        embedding = nn.Embedding(num_embeddings, embedding_dim)
        normal_initializer(std)(embedding.weight.data)
        return embedding
    from haloformer.model.megatron_layers import VocabEmbedding

    return VocabEmbedding(num_embeddings, embedding_dim, normal_initializer(std), tensor_group)


def plain_linear(in_features: int, out_features: int, std: float) -> nn.Linear:
    """A linear that is whole on every rank: weight from N(0, std), bias zero."""
    linear = nn.Linear(in_features, out_features)
    normal_initializer(std)(linear.weight.data)
    torch.nn.init.zeros_(linear.bias)
    return linear
