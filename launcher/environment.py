"""Variables that the DeepSpeed runner and the ranks need; decided without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal


def accelerator() -> Literal["cuda", "cpu"]:
    """What the ranks will run on: a GPU if the machine has one and torch was built for it."""
    has_device = any(Path("/dev").glob("nvidia[0-9]*"))
    cpu_build = importlib.metadata.version("torch").endswith("+cpu")
    return "cuda" if has_device and not cpu_build else "cpu"


def rank_environment(ranks_per_host: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of the runner and the ranks: the ones inherited, and what is missing from them.

    Args:
        ranks_per_host: Ranks that share this machine's cores.
        environment: What is inherited; a variable that is set there stays as it is.
    """
    cores = len(os.sched_getaffinity(0))
    wanted = {
        # gloo and the ranks' own threads fight for cores unless each rank has its share.
        "OMP_NUM_THREADS": str(max(1, cores // ranks_per_host)),
        # Without it DeepSpeed probes for accelerators and prints what it found.
        "DS_ACCELERATOR": accelerator(),
        # Progress bars of artifact uploads would tear up our lines.
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    return {**wanted, **environment}
