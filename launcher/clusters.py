"""Where a run goes, by the options of the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.cluster import Cluster
from haloformer.launcher.hosts import HostsError, num_slots, read_hostfile
from haloformer.launcher.launch import LocalCluster
from haloformer.launcher.slurm import SlurmCluster, allocation
from haloformer.launcher.ssh_cluster import SshCluster


def cluster_of(
    arguments: argparse.Namespace, config: TrainConfig, folder: Path
) -> tuple[Cluster, int]:
    """The machines, and the number of ranks.

    Args:
        arguments: ``ranks``, ``hostfile``, ``launcher``, ``master_addr``, ``master_port``.
        config: The recipe; on one machine it says how many ranks it needs.
        folder: Of the runs.

    Raises:
        ValueError: If the options do not fit together, or the hostfile is no hostfile.
    """
    ranks, port, address = arguments.ranks, arguments.master_port, arguments.master_addr
    if arguments.launcher == "slurm":
        if arguments.hostfile is not None:
            raise HostsError("--launcher slurm takes its hosts from SLURM; remove --hostfile")
        hosts = allocation(os.environ)
        cluster: Cluster = SlurmCluster(hosts, folder, port, address)
        return cluster, num_slots(hosts) if ranks is None else ranks
    if arguments.hostfile is not None:
        hosts = read_hostfile(arguments.hostfile)
        cluster = SshCluster(hosts, folder, port, address)
        return cluster, num_slots(hosts) if ranks is None else ranks
    for option, value in (("--launcher pdsh", arguments.launcher), ("--master-addr", address)):
        if value is not None:
            raise HostsError(f"{option} is for several hosts; name them with --hostfile")
    if ranks is None:
        ranks = config.parallel.context * config.parallel.tensor
    return LocalCluster(max(ranks, 1), port), ranks
