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


def add_cluster_options(parser: argparse.ArgumentParser, default_ranks: str) -> None:
    """The options that ``cluster_of`` reads.

    Args:
        parser: Of a command that starts ranks.
        default_ranks: How many there are without ``--ranks``, for the help.
    """
    parser.add_argument("--ranks", type=int, help=f"processes (default: {default_ranks})")
    parser.add_argument("--hostfile", type=Path, help="hosts to use, one 'name slots=N' per line")
    parser.add_argument(
        "--launcher",
        choices=["pdsh", "slurm"],
        help="for several hosts: pdsh (with --hostfile), or slurm (inside an allocation)",
    )
    parser.add_argument("--master-addr", help="address of rank 0 (default: as ssh reaches it)")
    parser.add_argument("--master-port", type=int, help="port of rank 0 (default: a free one)")


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
    if port is not None and not 0 < port < 1 << 16:
        raise HostsError(f"--master-port {port}: give a port from 1 to {(1 << 16) - 1}")
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
