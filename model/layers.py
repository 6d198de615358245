"""The linears and embeddings of every model: plain torch, or megatron-core's under tensor parallel.

Parameter names and initial values are the same either way, so a model built without a tensor
group works in any training loop, with no process group and no megatron import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from haloformer.kernels import products

Initializer = Callable[[Tensor], Tensor]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Linear(nn.Linear):
    """``nn.Linear`` whose fp32 products on a CPU are oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return products.linear(x, self.weight, self.bias)


def normal_initializer(std: float) -> Initializer:
    """Fill a tensor from N(0, std)."""

    def fill(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, mean=0.0, std=std)

    return fill


def tensor_share(count: int, what: str, tensor_group: ProcessGroup | None) -> range:
    """Which of ``count`` equal things (heads, features) are on this tensor-parallel rank.

    Raises:
        ValueError: If the ranks do not divide them.
    """
    if tensor_group is None:
        return range(count)
    size = tensor_group.size()
    if count % size:
        raise ValueError(f"{count} {what} cannot be split over {size} tensor-parallel ranks")
    share = count // size
    return range(tensor_group.rank() * share, (tensor_group.rank() + 1) * share)


def column_linear(
    in_features: int, out_features: int, std: float, tensor_group: ProcessGroup | None
) -> nn.Module:
    """A linear whose output features are split over the tensor-parallel ranks.

    Args:
        in_features: Features of the input, whole on every rank.
        out_features: Features of the output over all ranks.
        std: Standard deviation of the initial weight; the bias starts at zero.
        tensor_group: Tensor-parallel group; None gives :class:`Linear`.

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
        tensor_group: Tensor-parallel group; None gives :class:`Linear`.

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

    A vocabulary that the ranks do not divide gets rows of zeros at its end, which no token uses.

    Returns:
        A module ``int64 [...] -> [..., embedding_dim]``, whole on every rank.
    """
    if tensor_group is None:
        return plain_embedding(num_embeddings, embedding_dim, std)
    from haloformer.model.megatron_layers import VocabEmbedding, mark_padding

    def fill(weight: Tensor) -> Tensor:
        nn.init.zeros_(weight)
        normal_initializer(std)(weight[:num_embeddings])
        return weight

    rows = padded_vocab(num_embeddings, tensor_group)
    table = VocabEmbedding(rows, embedding_dim, fill, tensor_group)
    mark_padding(table.weight, num_embeddings)
    return table


def padded_vocab(vocab_size: int, tensor_group: ProcessGroup | None) -> int:
    """Rows of the token embedding over all tensor-parallel ranks."""
    size = 1 if tensor_group is None else tensor_group.size()
    return -(-vocab_size // size) * size


def vocab_bias(vocab_size: int, tensor_group: ProcessGroup | None) -> nn.Parameter:
    """A bias of zeros per token, split like :func:`vocab_embedding`."""
    rows = tensor_share(padded_vocab(vocab_size, tensor_group), "vocabulary rows", tensor_group)
    bias = nn.Parameter(torch.zeros(len(rows)))
    if tensor_group is not None:
        from haloformer.model.megatron_layers import mark_as_split, mark_padding

        mark_as_split(bias)
        mark_padding(bias, vocab_size)
    return bias


def vocab_logits(
    features: Tensor, weight: Tensor, bias: Tensor, tensor_group: ProcessGroup | None
) -> Tensor:
    """Scores of this rank's part of the vocabulary, by the tied embedding.

    Args:
        features: [..., E], whole on every rank.
        weight: [V / ranks, E] of :func:`vocab_embedding`.
        bias: [V / ranks].
        tensor_group: Tensor-parallel group.

    Returns:
        [..., V / ranks].
    """
    if tensor_group is not None:
        from haloformer.model.megatron_layers import enter_split

        features = enter_split(features, tensor_group)
    return products.linear(features, weight, bias)


def plain_linear(
    in_features: int, out_features: int, std: float, kind: type[Linear] = Linear
) -> Linear:
    """A linear that is whole on every rank: weight from N(0, std), bias zero."""
    linear = _unfilled(lambda: kind(in_features, out_features))
    normal_initializer(std)(linear.weight.data)
    torch.nn.init.zeros_(linear.bias)
    return linear


def plain_embedding(num_embeddings: int, embedding_dim: int, std: float) -> nn.Embedding:
    """A table that is whole on every rank, from N(0, std)."""
    table: nn.Embedding = _unfilled(lambda: nn.Embedding(num_embeddings, embedding_dim))
    normal_initializer(std)(table.weight.data)
    return table


def _unfilled(make: Callable[[], ModuleT]) -> ModuleT:
    """A module without torch's own initial values.

    They would draw numbers that megatron-core does not, and the same seed has to give the same
    weights with and without tensor parallelism.
    """
    with torch.device("meta"):
        module = make()
    return module.to_empty(device=torch.get_default_device())
