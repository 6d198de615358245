"""Compile every kernel for every target without a GPU, and refuse code that spills.

``python -m haloformer.kernels.compile_check`` compiles what the launchers would launch (the same
argument functions, on meta tensors) for sm_80, sm_90 and gfx942, looks into the machine code and
prints one line per kernel and target. A kernel passes when it needs no stack, has no local loads
or stores, fits the shared memory, and multiplies, if it multiplies, on tensor cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from haloformer.kernels.operands import BandOperands, launch_options
from haloformer.kernels.tiles import ARCHITECTURES, DTYPES, PADDED_DIMS, Tile
from haloformer.kernels.triton_bwd import (
    global_grad_arguments,
    key_grad_arguments,
    query_grad_arguments,
    query_grad_kernel,
)
from haloformer.kernels.triton_bwd_keys import global_grad_kernel, key_grad_kernel
from haloformer.kernels.triton_dropout import DROPOUT_TILE, dropout_arguments, dropout_kernel
from haloformer.kernels.triton_fwd import forward_arguments, forward_kernel

KERNELS = ("forward", "query_grad", "key_grad", "global_grad", "dropout")
# They multiply nothing, so they need no tensor cores.
WITHOUT_PRODUCTS = ("dropout",)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may take. sm_80's tiles also serve consumer chips.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# The one kernel on sm_90 that multiplies with mma instead of wgmma: every tile of 64 keys, which
# wgmma needs, spills there (24 bytes at best).
WITHOUT_WGMMA = {("key_grad", torch.float32, 128)}
# Instructions of the tensor cores.
TENSOR_PATTERN = {"sm_80": r"\bHMMA\.", "sm_90": r"\bH[GM]?MMA\.", "gfx942": r"\bv_mfma_"}
_SIGNATURE = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Job:
    """One kernel for one target; ``plain`` leaves out masks, segments, globals and dropout."""

    kernel: str
    arch: str
    dtype: torch.dtype
    head_dim: int
    plain: bool = False
    tile: Tile | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kind = "plain" if self.plain else "full"
        return f"{self.kernel:11} {self.arch:6} {dtype:8} D={self.head_dim:<3} {kind:5}"


# A tile known to spill: a check that lets it pass sees nothing.
NEGATIVE_CONTROL = Job(
    "global_grad", "sm_90", torch.float32, 64, tile=Tile(64, 16, num_warps=8, num_stages=1)
)


@dataclass(frozen=True)
class Report:
    """What the machine code of a job looks like, and what is wrong with it."""

    job: Job
    tile: Tile
    registers: int
    stack: int
    shared: int
    local_accesses: int
    tensor_instructions: int
    wgmma: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        t = self.tile
        tile = f"{t.block_rows}x{t.block_columns} w{t.num_warps} s{t.num_stages}"
        verdict = "ok" if not self.faults else "FAIL: " + ", ".join(self.faults)
        return (
            f"{self.job} {tile:13} regs={self.registers:<3} stack={self.stack:<4}"
            f" shared={self.shared:<6} tensor={self.tensor_instructions:<4}"
            f" wgmma={self.wgmma:<3} {verdict}"
        )


def example_operands(dtype: torch.dtype, head_dim: int, plain: bool) -> BandOperands:
    """Operands without data whose shapes stand for a real call."""
    batch, rows, buffer, heads, num_globals = 2, 4096, 4608, 16, 64

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = BandOperands(
        query=empty(batch, rows, heads, head_dim),
        key=empty(batch, buffer, heads, head_dim),
        value=empty(batch, buffer, heads, head_dim),
        windows=((256,) * heads, (256,) * heads, (1,) * heads),
        offset=256,
        low=0,
        high=buffer,
    )
    if plain:
        return operands
    return replace(
        operands,
        key_mask=empty(batch, buffer, dtype=torch.bool),
        query_segments=empty(batch, rows, dtype=torch.int32),
        key_segments=empty(batch, buffer, dtype=torch.int32),
        global_key=empty(batch, num_globals, heads, head_dim),
        global_value=empty(batch, num_globals, heads, head_dim),
        global_mask=empty(batch, num_globals, dtype=torch.bool),
        global_segments=empty(batch, num_globals, dtype=torch.int32),
        bases=empty(batch, heads, dtype=torch.int32),
        global_columns=empty(batch, num_globals, dtype=torch.int64),
        rate=0.1,
    )


def kernel_and_arguments(job: Job) -> tuple[Any, Tile, dict[str, Any]]:
    """The jit function of a job, its tile, and the arguments its launcher would pass."""
    x = example_operands(job.dtype, job.head_dim, job.plain)
    out = torch.empty(x.query.shape, dtype=job.dtype, device="meta")
    like_key = torch.empty(x.key.shape, dtype=job.dtype, device="meta")
    lse = torch.empty(x.query.shape[:3], device="meta")
    rows = {"OUT_GRAD": out, "LSE": lse, "DELTA": lse}
    if job.kernel == "forward":
        kernel, (tile, arguments) = forward_kernel, forward_arguments(x, job.arch, out, lse)
    elif job.kernel == "query_grad":
        kernel = query_grad_kernel
        tile, arguments = query_grad_arguments(x, job.arch, rows | {"OUT": out}, out)
    elif job.kernel == "dropout":
        kernel, tile = dropout_kernel, DROPOUT_TILE
        hidden = out.flatten(2)
        bases = torch.empty(hidden.shape[0], 1, dtype=torch.int32, device="meta")
        arguments = dropout_arguments(hidden, bases, hidden, 0.1, 4096, 0)
    elif job.kernel == "key_grad":
        kernel = key_grad_kernel
        tile, arguments = key_grad_arguments(x, job.arch, rows, (like_key, like_key))
    else:
        kernel = global_grad_kernel
        tile, arguments = global_grad_arguments(x, job.arch, rows, (lse, lse))
    if job.tile is not None:
        tile = job.tile
        sizes = {"BM": tile.block_rows, "BN": tile.block_columns, "LEAN": tile.lean}
        arguments |= {name: size for name, size in sizes.items() if name in arguments}
    return kernel, tile, arguments


def as_source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel with its arguments specialised as a launch would specialise them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments[name]
        if value is None or parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        divisible = isinstance(value, Tensor) or (
            isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0
        )
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            signature[name] = _SIGNATURE[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(kernel, signature, constants, attributes)


def inspect_cubin(cubin: bytes) -> tuple[int, int, int, str]:
    """Registers, stack bytes, local loads and stores, and disassembly of an NVIDIA binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia
        usage = subprocess.run(
            [tools.cuobjdump.path, "-res-usage", str(path)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        code = subprocess.run(
            [tools.nvdisasm.path, "-c", str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    assert found is not None, usage
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return int(found[1]), int(found[2]), local, code


def inspect_gcn(code: str) -> tuple[int, int, int, str]:
    """Registers, stack bytes, scratch accesses, and the assembly of an AMD kernel.

    Scalar registers kept in vector lanes count as spills in the metadata, but cost no memory.
    """

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        assert found is not None, key
        return int(found[1])

    scratch = len(re.findall(r"\bscratch_(?:load|store)", code))
    return number("vgpr_count"), number("private_segment_fixed_size"), scratch, code


def check(job: Job, changed: Mapping[str, Any] = MappingProxyType({})) -> Report:
    """Compile one job, with some arguments changed, and judge its machine code."""
    kernel, tile, arguments = kernel_and_arguments(job)
    source = as_source(kernel, {**arguments, **changed})
    compiled = triton.compile(source, target=TARGETS[job.arch], options=launch_options(tile))
    inspect = (
        inspect_gcn(compiled.asm["amdgcn"])
        if job.arch == "gfx942"
        else inspect_cubin(compiled.asm["cubin"])
    )
    registers, stack, local, code = inspect
    tensor = len(re.findall(TENSOR_PATTERN[job.arch], code))
    wgmma = len(re.findall(r"\bHGMMA\.", code))
    shared = compiled.metadata.shared
    faults = []
    if stack:
        faults.append(f"{stack} bytes of stack")
    if local:
        faults.append(f"{local} local loads/stores")
    needs_tensor_cores = job.kernel not in WITHOUT_PRODUCTS
    if needs_tensor_cores and not tensor:
        faults.append("no tensor-core instruction")
    excused = (job.kernel, job.dtype, job.head_dim) in WITHOUT_WGMMA
    if needs_tensor_cores and job.arch == "sm_90" and not wgmma and not excused:
        faults.append("no wgmma instruction")
    if shared > SHARED_LIMIT[job.arch]:
        faults.append(f"{shared} bytes of shared memory exceed {SHARED_LIMIT[job.arch]}")
    return Report(job, tile, registers, stack, shared, local, tensor, wgmma, tuple(faults))


def all_jobs() -> Iterator[Job]:
    """Every kernel x target x dtype x head dim, with everything on and with nothing on."""
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            for head_dim in PADDED_DIMS:
                for kernel in KERNELS:
                    if kernel == "dropout" and head_dim != PADDED_DIMS[0]:
                        continue  # it knows no heads
                    yield Job(kernel, arch, dtype, head_dim)
                    if kernel not in ("global_grad", "dropout"):  # those have no plain form
                        yield Job(kernel, arch, dtype, head_dim, plain=True)


def check_all(jobs: Iterable[Job], workers: int) -> Iterator[Report]:
    """Check jobs in parallel, in order."""
    # spawn: a forked child would inherit torch's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(check, jobs)


def main(argv: list[str] | None = None) -> int:
    """Print one line per job; 0 when all pass and the negative control fails, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m haloformer.kernels.compile_check",
        description="Compile every attention kernel for every target; refuse code that spills.",
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    parser.add_argument("--control", action="store_true", help="only a tile that must be refused")
    options = parser.parse_args(argv)
    if options.control:
        report = check(NEGATIVE_CONTROL)
        print(report)
        return 1 if report.faults else 0
    jobs = [j for j in all_jobs() if j.arch in options.arch and j.kernel in options.kernel]
    started = time.monotonic()
    failed = 0
    for report in check_all([*jobs, NEGATIVE_CONTROL], options.jobs):
        if report.job == NEGATIVE_CONTROL:
            continue
        failed += bool(report.faults)
        print(report, flush=True)
    blind = not report.faults
    print(f"negative control: {'PASSED, so the check is blind' if blind else 'refused'}")
    print(f"{len(jobs)} kernels, {failed} failed, {time.monotonic() - started:.0f} s")
    return 1 if failed or blind else 0


if __name__ == "__main__":
    sys.exit(main())
