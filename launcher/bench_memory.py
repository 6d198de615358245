"""One memory measurement of ``haloformer bench attention``, in a process of its own.

Growth of resident memory is honest only in a process that did nothing else before: an allocator
keeps what an earlier contender freed. So the bench starts this module once per number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from haloformer.launcher.bench_peers import (
    MAKERS,
    Part,
    Shape,
    UnavailableError,
    named_backend,
    run_once,
)

# Freed blocks of this size go back to the system at once, so resident memory is live memory.
_RETURN_ABOVE = str(1 << 18)


def peak_growth_mib(name: str, shape: Shape, part: Part, backend: str, threads: int) -> float:
    """Peak growth of resident memory while a contender runs once, beyond its inputs.

    Args:
        name: Of ``MAKERS``.
        shape: What it runs on.
        part: Forward, or forward and backward.
        backend: Who computes our op.
        threads: Of torch.

    Returns:
        MiB.

    Raises:
        UnavailableError: If it cannot be measured here; says why.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise UnavailableError("memory is measured on Linux only")
    fields = json.dumps(dataclasses.asdict(shape))
    command = [sys.executable, "-m", "haloformer.launcher.bench_memory", name, part]
    done = subprocess.run(
        [*command, "--shape", fields, "--backend", backend, "--threads", str(threads)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": _RETURN_ABOVE},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnavailableError(f"memory not measured: {last}")
    return float(json.loads(done.stdout)["growth_mib"])


def main() -> None:
    """Measure, and print ``{"growth_mib": x}``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=MAKERS)
    parser.add_argument("part", choices=("fwd", "fwd_bwd"))
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape(**arguments.shape)
    attend = named_backend(arguments.backend, shape)
    small = dataclasses.replace(shape, n=2 * shape.window)
    # Libraries load and threads start on a small run; a compiler's own memory is nobody's op.
    first = shape if arguments.name == "flex" else small
    run_once(MAKERS[arguments.name](first, attend), arguments.part)
    contender = MAKERS[arguments.name](shape, attend)
    if arguments.name == "flex":
        run_once(contender, arguments.part)
    # 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    run_once(contender, arguments.part)
    print(json.dumps({"growth_mib": (_status_kib("VmHWM") - before) / 1024}))


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise UnavailableError(f"this kernel does not tell {field}")


if __name__ == "__main__":
    main()
