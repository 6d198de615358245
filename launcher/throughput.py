"""How fast a machine is at its best, and how much memory a process has held."""

from __future__ import annotations

import resource
import statistics
import time

import torch

from haloformer.launcher.plan_devices import DEVICES


def peak_flops(device: torch.device) -> float:
    """Peak of one rank's device: a table for GPUs, a measured fp32 matrix product on a CPU.

    Returns:
        FLOP/s; 0.0 for a GPU that is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # A100-80 and A100-40 are one chip, and its name says neither in the same way.
        return next((d.bf16 for d in DEVICES.values() if d.name.partition("-")[0] in name), 0.0)
    size = 1024
    a = torch.ones(size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
