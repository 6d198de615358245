"""Which rank does what: megatron-core's groups, and the adapter that shows them to DeepSpeed."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

with warnings.catch_warnings():
    # megatron-core 0.16.1 tells at import that Transformer Engine and Apex are not there (we need
    # neither), and trips over its own and torch.jit's deprecations.
    warnings.filterwarnings("ignore", "Transformer Engine and Apex", UserWarning)
    warnings.filterwarnings("ignore", "The following imports from", DeprecationWarning)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    from megatron.core import parallel_state

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes.

    Rank order, for data 2 x context 2 x tensor 1:

        rank     0  1  2  3
        data     0  0  1  1      rank 0 and 1 hold the halves of one sequence
        context  0  1  0  1
    """

    data: int
    context: int
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in ("data", "context", "tensor"):
            size = getattr(self, axis)
            if size < 1:
                raise ValueError(f"layout: {axis} {size} is less than 1; use 1 for no split")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.context * self.tensor


@dataclass(frozen=True)
class Topology:
    """This rank's place on every axis, and the groups it talks in.

    ``data_context_group`` is what ZeRO shards over and what gradients are averaged over.
    ``tensor_group`` is None at size 1, so that the model uses plain torch layers.
    ``control_group`` is all ranks over gloo, whatever the tensors travel over: checkpoints are
    agreed on in it, in the background of training.
    """

    layout: Layout
    rank: int
    data_rank: int
    context_rank: int
    tensor_rank: int
    data_context_rank: int
    data_group: ProcessGroup
    context_group: ProcessGroup
    data_context_group: ProcessGroup
    tensor_group: ProcessGroup | None
    control_group: ProcessGroup
    device: torch.device


def build_topology(layout: Layout, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Topology:
    """Create the groups of a layout. torch.distributed must be up.

    Args:
        layout: Of the ranks.
        timeout: After which a collective in one of the groups gives up.

    Raises:
        ValueError: If the layout does not fill the world.
    """
    world_size = dist.get_world_size()
    if layout.world_size != world_size:
        raise ValueError(
            f"layout data {layout.data} x context {layout.context} x tensor {layout.tensor} needs "
            f"{layout.world_size} ranks, but {world_size} were started; start {layout.world_size}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    data_context_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    cuda = dist.get_backend() == "nccl"
    return Topology(
        layout=layout,
        rank=dist.get_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_context_rank=dist.get_rank(data_context_group),
        data_group=parallel_state.get_data_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_context_group=data_context_group,
        tensor_group=(
            parallel_state.get_tensor_model_parallel_group() if layout.tensor > 1 else None
        ),
        # A slow upload is no failure, and a dead rank closes its connections at once.
        control_group=dist.new_group(backend="gloo", timeout=timedelta(hours=12)),
        device=torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu"),
    )


def destroy_topology(topology: Topology) -> None:
    """Forget the groups, so that another layout can be built in this process."""
    # megatron drops its references only; the groups themselves (threads and sockets of gloo)
    # would stay until the process ends.
    groups = [
        group
        for group in parallel_state._global_process_group_list or []
        if group not in (None, dist.GroupMember.NON_GROUP_MEMBER)
    ]
    parallel_state.destroy_model_parallel()
    for group in [*groups, topology.control_group]:
        dist.destroy_process_group(group)


class MpuAdapter:
    """What DeepSpeed asks of a "model parallel unit".

    DeepSpeed's data-parallel group is our data x context group, and it sees no sequence
    parallelism of its own: context ranks hold the same weights and different rows, which for
    ZeRO is the same as different samples. Telling it about sequence groups instead gives wrong
    gradients at ZeRO-3 with no error (grad norm 0.243 for 0.335).
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._ranks = dist.get_process_group_ranks(topology.data_context_group)
        # A group of this rank alone: megatron has one even at tensor size 1.
        self._tensor_group: ProcessGroup = parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_group(self) -> ProcessGroup:
        """Tensor-parallel ranks, over which the gradient norm is summed."""
        return self._tensor_group

    def get_model_parallel_rank(self) -> int:
        """Rank on the tensor axis."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._topology.layout.tensor

    def get_data_parallel_group(self) -> ProcessGroup:
        """The data x context group."""
        return self._topology.data_context_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data x context group."""
        return self._ranks

    def get_data_parallel_rank(self) -> int:
        """Rank in the data x context group."""
        return self._topology.data_context_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data x context group."""
        return len(self._ranks)

    def get_sequence_data_parallel_group(self) -> ProcessGroup:
        """The same data x context group."""
        return self._topology.data_context_group

    def get_sequence_data_parallel_rank(self) -> int:
        """Rank in the data x context group."""
        return self._topology.data_context_rank

    def get_sequence_data_parallel_world_size(self) -> int:
        """Size of the data x context group."""
        return len(self._ranks)

    def get_sequence_parallel_group(self) -> None:
        """None: see the class docstring."""
        return None

    def get_sequence_parallel_rank(self) -> int:
        """0: see the class docstring."""
        return 0

    def get_sequence_parallel_world_size(self) -> int:
        """1: see the class docstring."""
        return 1
