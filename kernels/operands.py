"""Operands of one window attention call on the Triton kernels, and how they become arguments.

The launchers and the compile check build the arguments with the same functions, so what is checked
for an architecture is what runs on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from haloformer.kernels.dropout import drop_threshold
from haloformer.kernels.tiles import INTERPRETER, Tile, architecture_of, padded_dim

Windows = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class BandOperands:
    """What the forward and the backward launch share.

    Attributes:
        query: [B, n, H, D].
        key: [B, m, H, D]; query row i stands at buffer row i + offset.
        value: [B, m, H, D].
        windows: Per-head left, right and dilation.
        offset: Buffer row of query row 0.
        low: First buffer row that exists.
        high: One past the last buffer row that exists.
        key_mask: [B, m] bool, or None.
        query_segments: [B, n] int, or None.
        key_segments: [B, m] int, or None.
        global_key: [B, G, H, D], or None.
        global_value: [B, G, H, D], or None.
        global_mask: [B, G] bool, or None.
        global_segments: [B, G] int, or None.
        bases: [B, H] int32 hash bases of the dropout, or None.
        global_columns: [B, G] int64 dropout columns of the global keys, or None.
        rate: Dropout rate.
        first_row: Position in the whole sequence of query row 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    windows: Windows
    offset: int
    low: int
    high: int
    key_mask: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    global_key: Tensor | None = None
    global_value: Tensor | None = None
    global_mask: Tensor | None = None
    global_segments: Tensor | None = None
    bases: Tensor | None = None
    global_columns: Tensor | None = None
    rate: float = 0.0
    first_row: int = 0

    @property
    def num_globals(self) -> int:
        """Global keys per example."""
        return 0 if self.global_key is None else self.global_key.shape[1]

    @property
    def num_sample_heads(self) -> int:
        """B * H, the second axis of every grid."""
        return self.query.shape[0] * self.query.shape[2]

    def num_blocks(self, num_rows: int, block: int) -> int:
        """Programs that cover ``num_rows`` rows of the head that needs most of them."""
        return max(d * _ceil_div(_ceil_div(num_rows, d), block) for d in set(self.windows[2]))

    def device_guard(self) -> contextlib.AbstractContextManager[Any]:
        """Make the operands' device current: Triton launches on the current one."""
        return device_guard(self.query.device)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current, where there is something to make current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=256)
def window_table(windows: Windows, device: torch.device) -> Tensor:
    """[3, H] int32 table of the windows, copied to a device once."""
    return torch.tensor(windows, dtype=torch.int32, device=device)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous bytes, which is how the kernels load it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def as_int32(ids: Tensor | None) -> Tensor | None:
    """Segment ids as contiguous int32; only their equality counts."""
    return None if ids is None else ids.to(torch.int32).contiguous()


def addressable(x: Tensor) -> Tensor:
    """``x`` as the kernels walk it, copied only if they could not.

    Its features are next to each other, and its heads so near that a 32-bit offset finds them.
    """
    near = x.shape[2] * x.stride(2) < 1 << 31
    return x if x.stride(-1) == 1 and near else x.contiguous()


def shared_arguments(operands: BandOperands, arch: str, precision: str) -> dict[str, Any]:
    """Arguments that every kernel takes, by name.

    Args:
        operands: The call.
        arch: Architecture of the tile table.
        precision: Input precision of ``tl.dot``.
    """
    x = operands
    query, key, value = addressable(x.query), addressable(x.key), addressable(x.value)
    head_dim = query.shape[3]
    strides = {
        f"{name}_{axis}": tensor.stride(dim)
        for name, tensor in (("q", query), ("k", key), ("v", value))
        for dim, axis in enumerate("bnh")
    }
    return {
        "QUERY": query,
        "KEY": key,
        "VALUE": value,
        "WINDOWS": window_table(x.windows, query.device),
        "KEY_MASK": as_bytes(x.key_mask),
        "QUERY_SEGMENTS": as_int32(x.query_segments),
        "KEY_SEGMENTS": as_int32(x.key_segments),
        "GLOBAL_KEY": None if x.global_key is None else x.global_key.contiguous(),
        "GLOBAL_VALUE": None if x.global_value is None else x.global_value.contiguous(),
        "GLOBAL_MASK": as_bytes(x.global_mask),
        "GLOBAL_SEGMENTS": as_int32(x.global_segments),
        "BASES": None if x.bases is None else x.bases.contiguous(),
        "GLOBAL_COLUMNS": None if x.global_columns is None else x.global_columns.contiguous(),
        "num_rows": query.shape[1],
        "buffer_rows": key.shape[1],
        "num_heads": query.shape[2],
        "num_globals": x.num_globals,
        "offset": x.offset,
        "low": x.low,
        "high": x.high,
        "first_row": x.first_row,
        "threshold": drop_threshold(x.rate),
        "scale": head_dim**-0.5,
        "keep_scale": 1.0 / (1.0 - x.rate),
        **strides,
        "D": head_dim,
        "BD": padded_dim(head_dim),
        "PRECISION": precision,
        "UPCAST": arch == INTERPRETER and query.dtype == torch.bfloat16,
    }


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def current_architecture(device: torch.device) -> str:
    """Architecture of the tile table for the tensors' device."""
    return INTERPRETER if interpreted() else architecture_of(device)


def launch_options(tile: Tile) -> dict[str, int]:
    """Launch options of a tile."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


# Integers that must not become part of a kernel's identity: windows, lengths and offsets change
# from layer to layer and from rank to rank without a new compilation.
RUNTIME_INTEGERS: Sequence[str] = (
    "num_rows",
    "buffer_rows",
    "num_heads",
    "num_globals",
    "offset",
    "low",
    "high",
    "first_row",
    "threshold",
)
