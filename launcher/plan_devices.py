"""Accelerators and their links in numbers, and the shares of them that a step is taken to reach.

Peaks are dense (no sparsity) and links count one direction, as the vendors' data sheets give them,
written down from memory: look one up before you rent by it. The network is that of the vendors'
8-GPU machines, per GPU. The shares are assumptions, stated with
every forecast, and no measurement of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30
_T, _G = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator and its way to others.

    Attributes:
        name: For people.
        bf16: FLOP/s of dense matrix products.
        fp32: The same in fp32, without tf32, which torch leaves off.
        memory: Bytes.
        bandwidth: Bytes per second to its own memory.
        node_link: Bytes per second to others of the node, one direction.
        network: Bytes per second to other nodes, one direction.
    """

    name: str
    bf16: float
    fp32: float
    memory: int
    bandwidth: float
    node_link: float
    network: float

    def peak(self, width: int) -> float:
        """FLOP/s for weights of so many bytes."""
        return self.bf16 if width == 2 else self.fp32


@dataclass(frozen=True)
class Shares:
    """What a real step reaches of the data sheet: assumptions.

    Attributes:
        products: Of the peak, in matrix products of a layer's size.
        bandwidth: Of the memory's bandwidth, in what is done element by element.
        links: Of a link's bandwidth.
        latency: Seconds until a message or a collective has begun.
        memory: Of the memory, what a step may fill; the rest is the allocator's and NCCL's.
    """

    products: float = 0.5
    bandwidth: float = 0.7
    links: float = 0.7
    latency: float = 2e-5
    memory: float = 0.9


DEVICES = {
    # NVIDIA H100 SXM data sheet (2023): 989 TFLOP/s bf16, 67 fp32, 3.35 TB/s, NVLink 900 GB/s in
    # both directions; DGX H100: a 400 Gb/s adapter per GPU.
    "h100": Device("H100", 989 * _T, 67 * _T, 80 * _GIB, 3350 * _G, 450 * _G, 50 * _G),
    # NVIDIA H200 data sheet (2024): an H100 with 141 GB at 4.8 TB/s.
    "h200": Device("H200", 989 * _T, 67 * _T, 141 * 10**9, 4800 * _G, 450 * _G, 50 * _G),
    # NVIDIA DGX B200 data sheet (2024), an eighth of it: 2250 TFLOP/s, 180 GB, 8 TB/s, 1.8 TB/s.
    "b200": Device("B200", 2250 * _T, 75 * _T, 180 * 10**9, 8000 * _G, 900 * _G, 50 * _G),
    # NVIDIA A100 SXM data sheet (2021): 312 TFLOP/s, 19.5 fp32, NVLink 600 GB/s; DGX
    # A100: 200 Gb/s per GPU.
    "a100-80": Device("A100-80", 312 * _T, 19.5 * _T, 80 * _GIB, 2039 * _G, 300 * _G, 25 * _G),
    "a100-40": Device("A100-40", 312 * _T, 19.5 * _T, 40 * _GIB, 1555 * _G, 300 * _G, 25 * _G),
    # NVIDIA L40S data sheet (2023): 362 TFLOP/s, 91.6 fp32, 48 GB, 864 GB/s, PCIe 4.0 x16; the
    # network is an assumption: 200 Gb/s for two.
    "l40s": Device("L40S", 362 * _T, 91.6 * _T, 48 * 10**9, 864 * _G, 32 * _G, 12.5 * _G),
    # AMD Instinct MI300X data sheet (2023): 1307 TFLOP/s, 163.4 fp32, 192 GB, 5.3 TB/s, Infinity
    # Fabric 896 GB/s in both directions.
    "mi300x": Device("MI300X", 1307 * _T, 163.4 * _T, 192 * 10**9, 5300 * _G, 448 * _G, 50 * _G),
    # One core of a server, no data sheet: 50 GFLOP/s, 8 GiB, gloo over the loopback or 10 Gb/s.
    "cpu": Device("CPU core", 50 * _G, 50 * _G, 8 * _GIB, 10 * _G, 1 * _G, 1.25 * _G),
}
