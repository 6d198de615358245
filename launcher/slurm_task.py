"""One task of srun becomes one rank; started by SLURM, never by hand."""

from __future__ import annotations

import os
import sys

from haloformer.launcher import worker

# What DeepSpeed's launcher would set, and where SLURM says it. MASTER_ADDR and MASTER_PORT come
# from the launching process.
_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main() -> int:
    """Run the worker; returns its exit code."""
    for name, source in _NAMES.items():
        os.environ[name] = os.environ[source]
    sys.argv.append(f"--local_rank={os.environ['LOCAL_RANK']}")
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
