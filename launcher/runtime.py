"""Start-up of a rank: DeepSpeed's import, its process group, and the quiet around them.

Nothing is compiled. DeepSpeed builds a shared-memory collective on CPU (g++, half a minute, and
a lock file that hangs the next start if the build is killed), but calls it only from its
inference engine, which we do not use; so we tell it that the operation is not available.
"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch

# Read by DeepSpeed when it is imported; without it, it probes for devices and warns on a CPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

with warnings.catch_warnings():
    # DeepSpeed 0.19.8 imports torch.jit.script_method, which torch 2.13 deprecates.
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    import deepspeed as deepspeed  # other modules take it from here, so that this runs first
    import deepspeed.ops

DEEPSPEED_VERSION = "0.19.8"


def check_deepspeed() -> None:
    """Refuse a DeepSpeed whose internals were not read and tested.

    Raises:
        ValueError: Naming the version found and the one that works.
    """
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        raise ValueError(
            f"deepspeed {deepspeed.__version__} is installed, but checkpoints rely on internals of "
            f"{DEEPSPEED_VERSION}; run: pip install deepspeed=={DEEPSPEED_VERSION}"
        )


def init_distributed(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Start the process group of this rank, over NCCL with a GPU and gloo without.

    Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as the DeepSpeed runner sets
    them. If torch.distributed is up already, that group is used.

    Raises:
        ValueError: If this DeepSpeed is not the version the code was written for.
    """
    check_deepspeed()
    # build_shm_op() compiles only what is listed here; see the module docstring. An empty dict
    # also spares the compiler probes that would fill it.
    deepspeed.ops.__compatible_ops__ = {}
    # torch 2.13 renamed these two; DeepSpeed 0.19.8 calls the old names in every step.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings(
            "ignore", f"`torch.distributed.{name}` is deprecated", category=FutureWarning
        )
    # megatron-core 0.16.1 advises one device queue; ours also carry halos, which one would hold up.
    warnings.filterwarnings("ignore", "When using async grad allreduce", category=UserWarning)
    # Its RowParallelLinear does not hand its group to a function that needs none there.
    warnings.filterwarnings("ignore", "Warning: tp_group is None", category=DeprecationWarning)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
