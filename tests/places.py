"""What each of 4 ranks is told about its place, under several layouts."""

from datetime import timedelta

import pytest
import torch
import torch.distributed

from haloformer.launcher.exchange import gather_json
from haloformer.launcher.topology import Layout, MpuAdapter, build_topology, destroy_topology

LAYOUTS = [Layout(4, 1), Layout(2, 2), Layout(1, 4), Layout(2, 1, 2), Layout(1, 2, 2)]


def describe(rank):
    """What this rank is told under each layout, then what refused layouts say."""
    seen = []
    for layout in LAYOUTS:
        topology = build_topology(layout, timedelta(seconds=77))
        adapter = MpuAdapter(topology)
        members = torch.distributed.get_process_group_ranks
        seen.append(
            {
                "ranks": (topology.data_rank, topology.context_rank, topology.tensor_rank),
                "data": members(topology.data_group),
                "context": members(topology.context_group),
                "data_context": members(topology.data_context_group),
                "timeout": str(_timeout(topology.context_group)),
                "tensor": topology.tensor_group and members(topology.tensor_group),
                "adapter_data": members(adapter.get_data_parallel_group()),
                "adapter_size": adapter.get_data_parallel_world_size(),
                "adapter_rank": adapter.get_data_parallel_rank(),
                "adapter_sequence": adapter.get_sequence_parallel_world_size(),
                "adapter_model": members(adapter.get_model_parallel_group()),
                "same": adapter.get_sequence_data_parallel_group() is topology.data_context_group,
            }
        )
        destroy_topology(topology)
    with pytest.raises(ValueError, match=r"needs 6 ranks, but 4 were started; start 6"):
        build_topology(Layout(3, 2))
    texts = gather_json({"rank": rank, "text": "x" * (rank * 100)}, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        gather_json(float("nan"), None, torch.device("cpu"))
    return seen, [(t["rank"], len(t["text"])) for t in texts]


def _timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout
