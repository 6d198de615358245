"""Parity, speed and tile choice of the Triton kernels on one CUDA card, in one call.

NOT YET RUN ON A GPU: written where there was none, and tried with `--device cpu` in Triton's
interpreter only (`TRITON_INTERPRET=1 python tests/bench/gpu.py --device cpu`).

Needs torch, triton and transformers, nothing else; flash_attn and natten join where they import.
Parity against float64 comes first, and nothing is timed if it fails. Under 8 minutes; what does
not fit is named as skipped. TFLOP/s count the mask's area: 4 * D per visible pair and head
forward, 2.5 times that backward.

    python tests/bench/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / ".pkg"), str(HERE.parent)]

import gpu_peers  # noqa: E402
from gpu_parity import check_parity  # noqa: E402

from haloformer.kernels import fused, triton_bwd, triton_bwd_keys, triton_fwd  # noqa: E402
from haloformer.kernels.band import Band  # noqa: E402
from haloformer.kernels.operands import (  # noqa: E402
    BandOperands,
    current_architecture,
    launch_options,
)
from haloformer.kernels.spec import WindowSpec  # noqa: E402
from haloformer.kernels.tiles import Tile  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """One timed shape; the window is two-sided, as in configs."""

    n: int
    window: int = 512
    head_dim: int = 64
    dilation: int = 1
    num_globals: int = 0
    num_heads: int = 16
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"n={self.n} w={self.window} D={self.head_dim} d={self.dilation}"
            f" G={self.num_globals} H={self.num_heads} {dtype}"
        )

    def band(self) -> Band:
        spec = WindowSpec.from_two_sided(self.window, self.num_heads, dilation=self.dilation)
        return Band(spec, 0, (0, self.n))

    def area(self) -> int:
        """Visible (row, key) pairs of one head, windows cut at the ends."""
        half, area = self.window // 2, self.n * self.num_globals
        for residue in range(min(self.dilation, self.n)):
            rows = len(range(residue, self.n, self.dilation))
            reach = min(half, rows - 1)
            area += rows * (2 * reach + 1) - reach * (reach + 1)
        return area

    def flops(self, backward: bool) -> float:
        forward = 4.0 * self.area() * self.head_dim * self.num_heads
        return forward * 3.5 if backward else forward

    def tensors(self, device: str) -> list[Tensor | None]:
        """Query, key, value, and global key and value or None."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(rows: int) -> Tensor:
            shape = (1, rows, self.num_heads, self.head_dim)
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return x.to(self.dtype).requires_grad_()

        rows = [draw(self.n) for _ in range(3)]
        return rows + [draw(self.num_globals) if self.num_globals else None for _ in range(2)]


def shapes(device: str) -> list[Shape]:
    """One axis at a time around N = 16K, w = 512, D = 64."""
    if device == "cpu":
        small = Shape(96, 32, 16, num_heads=2, dtype=torch.float32)
        return [small, replace(small, num_globals=1), replace(small, dilation=2)]
    base = Shape(16384)
    return [
        *(replace(base, n=n) for n in (4096, 16384, 65536, 131072)),
        *(replace(base, window=w) for w in (128, 256, 1024, 2048)),
        *(replace(base, dilation=d) for d in (2, 4)),
        *(replace(base, num_globals=g) for g in (1, 64)),
        *(replace(base, head_dim=128, n=n) for n in (16384, 65536)),
        replace(base, dtype=torch.float16),
        replace(base, dtype=torch.float32),
    ]


class Clock:
    """Times functions, and knows how much of the run is left."""

    def __init__(self, device: str, minutes: float) -> None:
        self._device = device
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self._end - time.monotonic()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of repeated runs on the card; one run on a CPU."""
        if self._device == "cpu":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        from triton.testing import do_bench

        return float(do_bench(run, warmup=25, rep=100, return_mode="median"))


def peak_mib(device: str, run: Callable[[], object]) -> float:
    """Peak memory that a run adds, in MiB."""
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_attention(
    name: str, shape: Shape, forward: Callable[[], Tensor], inputs: list[Tensor], clock: Clock,
    device: str,
) -> dict[str, object]:  # fmt: skip
    """Forward, and forward with backward, of one implementation on one shape."""
    grad = torch.ones_like(forward())

    def both() -> object:
        return torch.autograd.grad(forward(), inputs, grad)

    def only_forward() -> object:
        with torch.no_grad():
            return forward()

    forward_ms, both_ms = clock.milliseconds(only_forward), clock.milliseconds(both)
    return {
        "name": name,
        "shape": str(shape),
        "fwd_ms": forward_ms,
        "fwd_bwd_ms": both_ms,
        "fwd_tflops": shape.flops(False) / forward_ms / 1e9,
        "fwd_bwd_tflops": shape.flops(True) / both_ms / 1e9,
        "peak_mib": peak_mib(device, both),
    }


def time_ours(shape: Shape, clock: Clock, device: str) -> dict[str, object]:
    """Our op on a shape."""
    query, key, value, global_key, global_value = shape.tensors(device)
    band = shape.band()

    def forward() -> Tensor:
        return fused.window_attention(query, key, value, global_key, global_value, band)[0]

    inputs = [x for x in (query, key, value, global_key, global_value) if x is not None]
    return time_attention("haloformer", shape, forward, inputs, clock, device)


ALTERNATIVES = {
    "forward": [
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 128, 4, 2),
    ],
    "query_grad": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
    "key_grad": [(32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
}


def tile_trials(
    shape: Shape, device: str
) -> Iterator[tuple[str, Tile, Tile, Callable[[], object]]]:
    """Every alternative of every kernel: name, tile of the table, tile tried, launch."""
    query, key, value, _, _ = (None if x is None else x.detach() for x in shape.tensors(device))
    spec = shape.band().spec
    windows = (spec.left, spec.right, spec.dilation)
    x = BandOperands(query, key, value, windows, 0, 0, shape.n)
    arch = current_architecture(query.device)
    out, lse = triton_fwd.launch_forward(x)
    delta, grads = torch.zeros_like(lse), [torch.empty_like(y) for y in (query, key, value)]
    rows = {"OUT_GRAD": out, "LSE": lse, "DELTA": delta}
    kernels = {
        "forward": (
            triton_fwd.forward_kernel,
            triton_fwd.forward_arguments(x, arch, torch.empty_like(out), torch.empty_like(lse)),
        ),
        "query_grad": (
            triton_bwd.query_grad_kernel,
            triton_bwd.query_grad_arguments(x, arch, rows | {"OUT": out}, grads[0]),
        ),
        "key_grad": (
            triton_bwd_keys.key_grad_kernel,
            triton_bwd.key_grad_arguments(x, arch, rows, (grads[1], grads[2])),
        ),
    }
    for name, (kernel, (default, arguments)) in kernels.items():
        for tile in dict.fromkeys([default, *(Tile(*t) for t in ALTERNATIVES[name])]):
            mine = arguments | {"BM": tile.block_rows, "BN": tile.block_columns, "LEAN": tile.lean}
            block = tile.block_columns if name == "key_grad" else tile.block_rows
            grid = (x.num_blocks(shape.n, block), x.num_sample_heads)

            def launch(kernel=kernel, grid=grid, mine=mine, tile=tile) -> object:
                return kernel[grid](**mine, **launch_options(tile))

            yield name, default, tile, launch


def tune(clock: Clock, device: str, head_dim: int) -> list[dict[str, object]]:
    """Time the alternatives of the tile table on one shape."""
    shape = replace(shapes(device)[-1 if device == "cpu" else 1], head_dim=head_dim)
    found = []
    for name, default, tile, launch in tile_trials(shape, device):
        if clock.left() < 60:
            print(f"tile {name} D={head_dim} {tile}: skipped, out of time")
            continue
        entry = {"kernel": name, "head_dim": head_dim, "tile": str(tile), "ms": float("inf")}
        try:
            entry["ms"] = clock.milliseconds(launch)
        except Exception as error:  # too much shared memory is an answer, not an accident
            entry["error"] = str(error).splitlines()[0][:100]
        entry["default"] = tile == default
        print(f"tile {name:10} D={head_dim} {tile}: {entry['ms']:.3f} ms", flush=True)
        found.append(entry)
    return found


def print_summary(results: list[dict[str, object]], tiles: list[dict[str, object]]) -> None:
    """The short tables that come last."""
    print(f"\n{'':24}{'fwd ms':>9}{'f+b ms':>9}{'fwd TF/s':>10}{'f+b TF/s':>10}{'MiB':>8}")
    for shape in dict.fromkeys(r["shape"] for r in results):
        print(shape)
        for r in (r for r in results if r["shape"] == shape):
            if "error" in r:
                print(f"  {r['name']:22} {r['error']}")
            else:
                print(
                    f"  {r['name']:22}{r['fwd_ms']:9.3f}{r['fwd_bwd_ms']:9.3f}"
                    f"{r['fwd_tflops']:10.1f}{r['fwd_bwd_tflops']:10.1f}{r['peak_mib']:8.0f}"
                )
    for kernel, dim in dict.fromkeys((t["kernel"], t["head_dim"]) for t in tiles):
        mine = [t for t in tiles if (t["kernel"], t["head_dim"]) == (kernel, dim)]
        best = min(mine, key=lambda t: t["ms"])
        table = next((t["ms"] for t in mine if t["default"]), float("nan"))
        keep = "keep" if best["default"] else f"{table / best['ms']:.2f}x faster than the table"
        print(f"best tile {kernel:10} D={dim}: {best['tile']} {best['ms']:.3f} ms ({keep})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop starting work after this")
    options = parser.parse_args()
    clock, device = Clock(options.device, options.minutes), options.device
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu, interpreted"
    print(f"{card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    parity = check_parity(device)
    if not all(p["ok"] for p in parity):
        print("parity failed; nothing is timed")
        return 1
    results: list[dict[str, object]] = []
    for shape in shapes(device):
        if clock.left() < 60:
            print(f"haloformer {shape}: skipped, out of time")
            continue
        results.append(time_ours(shape, clock, device))
        print(f"haloformer {shape}: {results[-1]['fwd_tflops']:.1f} TFLOP/s forward", flush=True)
    dims = (16,) if device == "cpu" else (64, 128)
    tiles = [entry for dim in dims for entry in tune(clock, device, dim)]
    for shape in shapes(device):
        for name, make in gpu_peers.PEERS.items():
            if not gpu_peers.wanted(name, shape):
                continue
            if clock.left() < 45:
                print(f"{name} {shape}: skipped, out of time")
                continue
            try:
                forward, inputs = make(shape, device)
                results.append(time_attention(name, shape, forward, inputs, clock, device))
            except Exception as error:  # a peer that cannot run is a line in the table
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                results.append({"name": name, "shape": str(shape), "error": text[:80]})
            print(f"{name} {shape}: {results[-1].get('fwd_ms', results[-1].get('error'))}")
    print_summary(results, tiles)
    if options.json is not None:
        record = {"card": card, "torch": torch.__version__, "parity": parity}
        record |= {"results": results, "tiles": tiles}
        options.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
