"""The one table of tile sizes: what the launchers run is what the compile check compiles.

Every entry was found by compiling for its target: no stack, no local loads or stores, tensor-core
instructions present (``python -m haloformer.kernels.compile_check``). No entry was timed on a GPU
yet; ``tests/bench/gpu.py`` tries the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel.

    Attributes:
        block_rows: Query rows per tile.
        block_columns: Keys per tile.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        lean: Spend instructions to save registers: one loop with masks everywhere, and the rows
            that a program owns loaded again in each step.
    """

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int
    lean: bool = False


@dataclass(frozen=True)
class Tiles:
    """Tiles of the four kernels for one architecture, padded head_dim and dtype."""

    forward: Tile
    query_grad: Tile
    key_grad: Tile
    global_grad: Tile


ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
PADDED_DIMS = (64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETER = "interpreter"

_HALF = "half"  # fp16 and bf16 have the same size, so the same tiles
_SINGLE = "single"

_TABLE: dict[tuple[str, int, str], Tiles] = {
    ("sm_80", 64, _HALF): Tiles(
        forward=Tile(128, 64, 8, 2),
        query_grad=Tile(64, 32, 8, 2),
        key_grad=Tile(32, 64, 8, 2),
        global_grad=Tile(64, 16, 4, 2),
    ),
    ("sm_80", 128, _HALF): Tiles(
        forward=Tile(64, 32, 4, 2),
        query_grad=Tile(64, 32, 8, 2),
        key_grad=Tile(32, 64, 8, 2),
        global_grad=Tile(64, 16, 4, 2),
    ),
    ("sm_80", 64, _SINGLE): Tiles(
        forward=Tile(64, 16, 8, 1),
        query_grad=Tile(32, 32, 8, 1),
        key_grad=Tile(32, 32, 8, 1),
        global_grad=Tile(32, 16, 8, 1),
    ),
    ("sm_80", 128, _SINGLE): Tiles(
        forward=Tile(64, 32, 8, 1, lean=True),
        query_grad=Tile(64, 16, 8, 1, lean=True),
        key_grad=Tile(16, 32, 8, 1, lean=True),
        global_grad=Tile(32, 16, 8, 1, lean=True),
    ),
    ("sm_90", 64, _HALF): Tiles(
        forward=Tile(128, 64, 8, 2),
        query_grad=Tile(64, 64, 4, 2),
        key_grad=Tile(32, 64, 4, 2),
        global_grad=Tile(64, 16, 4, 2),
    ),
    ("sm_90", 128, _HALF): Tiles(
        forward=Tile(128, 64, 8, 2),
        query_grad=Tile(128, 32, 8, 2),
        key_grad=Tile(32, 64, 8, 2),
        global_grad=Tile(64, 16, 4, 2),
    ),
    ("sm_90", 64, _SINGLE): Tiles(
        forward=Tile(64, 16, 4, 1),
        query_grad=Tile(64, 16, 8, 1),
        key_grad=Tile(16, 64, 8, 1, lean=True),
        global_grad=Tile(32, 16, 8, 1, lean=True),
    ),
    ("sm_90", 128, _SINGLE): Tiles(
        forward=Tile(64, 32, 8, 1, lean=True),
        query_grad=Tile(64, 16, 8, 1, lean=True),
        # No tile of 64 keys, which wgmma wants, compiles here without a spill (24 bytes at 16x64).
        key_grad=Tile(32, 32, 8, 1, lean=True),
        global_grad=Tile(32, 16, 8, 1, lean=True),
    ),
}
for _dim in PADDED_DIMS:
    for _size in (_HALF, _SINGLE):
        _TABLE["gfx942", _dim, _size] = Tiles(
            forward=Tile(64, 32, 4, 1),
            query_grad=Tile(64, 32, 4, 1),
            key_grad=Tile(32, 64, 4, 1),
            global_grad=Tile(64, 16, 4, 1),
        )
_TABLE["gfx942", 128, _SINGLE] = replace(
    _TABLE["gfx942", 128, _SINGLE], key_grad=Tile(16, 64, 4, 1)
)
# Small tiles, so that short sequences in tests have edge and interior tiles.
_INTERPRETED = Tiles(Tile(32, 32, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1))
_INTERPRETED_LEAN = Tiles(
    Tile(32, 32, 1, 1, lean=True),
    Tile(32, 16, 1, 1, lean=True),
    Tile(16, 32, 1, 1, lean=True),
    Tile(32, 16, 1, 1, lean=True),
)


def padded_dim(head_dim: int) -> int:
    """Head dim as the kernel sees it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(arch: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Look the tiles up.

    Args:
        arch: One of ``ARCHITECTURES``, or ``INTERPRETER``.
        head_dim: Head dim, 1 to 128.
        dtype: float32, float16 or bfloat16.
    """
    if arch == INTERPRETER:
        # Lean where it is lean on a GPU: wide fp32 heads.
        wide = dtype == torch.float32 and padded_dim(head_dim) == 128
        return _INTERPRETED_LEAN if wide else _INTERPRETED
    size = _SINGLE if dtype == torch.float32 else _HALF
    return _TABLE[arch, max(64, padded_dim(head_dim)), size]


def dot_precision(arch: str, dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies.

    fp32 on NVIDIA takes three tf32 products: plain tf32 keeps 10 bits, and "ieee" has no tensor
    core. AMD multiplies fp32 exactly in its matrix cores.
    """
    if dtype == torch.float32 and arch.startswith("sm_"):
        return "tf32x3"
    return "ieee"


def architecture_of(device: torch.device) -> str:
    """The table's architecture for a CUDA or ROCm device.

    Devices without an entry of their own borrow one: consumer chips have the shared memory of the
    small tiles (sm_80), data-centre Blackwell that of sm_90.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_90" if major in (9, 10) else "sm_80"
