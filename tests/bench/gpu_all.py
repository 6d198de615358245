"""Everything there is to measure on CUDA GPUs: `make bench-gpu`.

The kernels by `gpu.py`, then whole training steps: ours on one rank and on as many as there are
GPUs, beside transformers, in fp32 and bf16. Without a GPU it says so and ends with exit code 2:
nothing was measured. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

GPU = Path(__file__).with_name("gpu.py")


def commands(num_gpus: int, device: str = "cuda", size: str = "real") -> list[list[str]]:
    """What is run, one after the other; each writes a file of JSON.

    Args:
        num_gpus: A rank of ours has one each.
        device: `cpu` for the tests, where there is none.
        size: Of the models of whole steps.
    """
    kernels = [sys.executable, str(GPU), "--device", device, "--json", "bench_gpu.json"]
    ranks = ",".join(str(n) for n in sorted({1, num_gpus}))
    found = [kernels]
    for precision in ("fp32", "bf16"):
        words = ["bench", "step", "--device", device, "--size", size, "--ranks", ranks]
        words += ["--precision", precision, "--json", f"bench_gpu_step_{precision}.json"]
        found.append([sys.executable, "-m", "haloformer.launcher.cli", *words])
    return found


def main() -> int:
    """Run all, also after one that fails; the exit code is that of the first that did."""
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        print("no CUDA GPU found: bench-gpu has nothing to measure here")
        return 2
    codes = []
    for command in commands(num_gpus):
        print(" ".join(command[1:]), flush=True)
        codes.append(subprocess.run(command, check=False).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
