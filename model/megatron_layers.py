"""megatron-core's tensor-parallel linears, called like torch's: a tensor in, a tensor out."""

from __future__ import annotations

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from haloformer.model.layers import Initializer


def _config(tensor_group: ProcessGroup) -> ModelParallelConfig:
    # use_cpu_initialization draws the whole weight from the same seed on every rank and slices
    # it, so the model is the same on every layout. Fused accumulation needs Apex and CUDA.
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor_group.size(),
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )


def mark_as_split(parameter: nn.Parameter) -> None:
    """Say that each rank holds a slice along dimension 0, or gradient norms count it wrongly."""
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)


def mark_padding(parameter: nn.Parameter, num_rows: int) -> None:
    """Say that the whole has ``num_rows`` rows and padding, which a checkpoint leaves out."""
    setattr(parameter, "unpadded_rows", num_rows)  # noqa: B010


def enter_split(x: Tensor, group: ProcessGroup) -> Tensor:
    """The same tensor; backward sums the gradients that the tensor-parallel ranks compute."""
    entered: Tensor = copy_to_tensor_model_parallel_region(x, group=group)
    return entered


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """``[..., in] -> [..., out / ranks]`` with bias."""

    def __init__(
        self, in_features: int, out_features: int, initializer: Initializer, group: ProcessGroup
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_config(group),
            init_method=initializer,
            bias=True,
            gather_output=False,
            tp_group=group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear; the bias is added here, so only the output is returned."""
        output: Tensor = super().forward(x)[0]
        return output


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """``[..., in / ranks] -> [..., out]`` with bias, summed over the ranks."""

    def __init__(
        self, in_features: int, out_features: int, initializer: Initializer, group: ProcessGroup
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_config(group),
            init_method=initializer,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear; the bias is added here, so only the output is returned."""
        output: Tensor = super().forward(x)[0]
        return output


class VocabEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """``int64 [...] -> [..., dim]``; every rank holds a slice of the vocabulary."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, initializer: Initializer, group: ProcessGroup
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            init_method=initializer,
            config=_config(group),
            tp_group=group,
        )
