"""Small values between ranks, as JSON in byte tensors: no pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

Json = Any  # what json.dumps takes: dict, list, str, int, float, bool, None


def gather_json(value: Json, group: ProcessGroup | None, device: torch.device) -> list[Json]:
    """Every rank's value, in rank order, on every rank.

    Args:
        value: Anything JSON holds, NaN and infinity excepted.
        group: Ranks that take part; None is all of them.
        device: Where the group's backend wants its tensors.
    """
    payload = json.dumps(value, allow_nan=False).encode()
    num_ranks = dist.get_world_size(group)
    length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(num_ranks)]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(n) for n in torch.cat(lengths).tolist()]
    # Ranks must agree on the size of what they send: pad to the longest.
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    padded = padded.to(device)
    received = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(received, padded, group=group)
    return [
        json.loads(bytes(row[:size].cpu().numpy()))
        for row, size in zip(received, sizes, strict=True)
    ]
