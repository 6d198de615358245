"""How fast and how big: tokens per second, FLOPs of a step, share of the machine's peak, memory."""

from __future__ import annotations

import resource
import statistics
import time

import torch

from haloformer.configs.models import EncoderConfig
from haloformer.kernels.fold import folding_pays

# Dense bf16 TFLOP/s without sparsity, from the vendors' data sheets.
GPU_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "V100": 125.0}


def forward_flops_per_token(
    config: EncoderConfig, vocab_size: int, *, num_globals: float, target_fraction: float
) -> float:
    """Floating-point operations of the forward pass per token of the sequence.

    Counted: every matrix product, a multiply-add as 2; the band by its true width w + 1 plus the
    global columns; the MLM head at masked positions only. Not counted: norms, softmax, dropout.

    Args:
        config: Sizes.
        vocab_size: Entries of the output projection.
        num_globals: Global tokens per sequence.
        target_fraction: Masked positions per token.
    """
    size = config.hidden_size
    # query, key, value, output.
    projections = 2 * 4 * size * size
    # QK and PV of the global rows over hidden states, or over projections made for them.
    if folding_pays(num_globals, config.num_heads, size):
        global_rows = 2 * 2 * size * config.num_heads * num_globals
    else:
        global_rows = 2 * 2 * size * (size + num_globals)
    ffn = 2 * 2 * size * config.ffn_size
    sides = 1 if config.causal else 2
    flops = 0.0
    for layer in range(config.num_layers):
        band = sides * (config.window_of_layer(layer) // 2) + 1
        # QK and PV over the band and the global columns.
        flops += projections + ffn + global_rows + 2 * 2 * size * (band + num_globals)
    head = 2 * size * (size + vocab_size)
    return flops + target_fraction * head


def training_flops_per_token(forward: float) -> float:
    """Forward and backward: the backward of a product is two products of the same size."""
    return 3.0 * forward


def peak_flops(device: torch.device) -> float:
    """Peak of one rank's device: a table for GPUs, a measured fp32 matrix product on a CPU.

    Returns:
        FLOP/s; 0.0 for a GPU that is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((1e12 * peak for key, peak in GPU_PEAK_TFLOPS.items() if key in name), 0.0)
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
