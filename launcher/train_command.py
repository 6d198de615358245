"""``haloformer train``: check everything, start the ranks, say how it ended and what to do next."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mlflow import MlflowClient

from haloformer.configs.load import check_world, load_config
from haloformer.configs.schema import TrainConfig
from haloformer.configs.sizes import num_parameters
from haloformer.launcher import tracking
from haloformer.launcher.attempt import StopSignals
from haloformer.launcher.catalog import Catalog, check_disk
from haloformer.launcher.cluster import Cluster
from haloformer.launcher.clusters import cluster_of
from haloformer.launcher.hosts import Host, fill, num_slots
from haloformer.launcher.plot import write_curve
from haloformer.launcher.resume import resume_point
from haloformer.launcher.run_dir import Plan, RunDir
from haloformer.launcher.sources import check_data
from haloformer.launcher.supervise import Job, supervise

RUNS = Path("runs")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``train``."""
    parser = commands.add_parser(
        "train",
        help="train a recipe on this machine or on many",
        description="Check a recipe and the hosts, start the ranks under DeepSpeed and train.",
        epilog="example: haloformer train enwiki_mlm steps=300 parallel.zero_stage=2 --ranks 2",
    )
    parser.add_argument("config", help="recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes (default: what the recipe needs; on several hosts, all slots)",
    )
    parser.add_argument(
        "--hostfile", type=Path, help="hosts to train on, one 'name slots=N' per line"
    )
    parser.add_argument(
        "--launcher",
        choices=["pdsh", "slurm"],
        help="for several hosts: pdsh (with --hostfile), or slurm (inside an allocation)",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="when a rank or a host is lost, go on with what is left from the newest checkpoint",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_ID|latest|auto",
        help="continue from the newest good checkpoint; auto: start afresh when there is none",
    )
    parser.add_argument("--master-addr", help="address of rank 0 (default: as ssh reaches it)")
    parser.add_argument("--master-port", type=int, help="port of rank 0 (default: a free one)")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = load_config(arguments.config, arguments.overrides)
    cluster, ranks = cluster_of(arguments, config, RUNS)
    check_world(config, ranks)
    vocab_size = check_data(config)
    used = fill(cluster.hosts, ranks)
    cluster.check(used)
    job = _prepare(arguments, config, vocab_size, cluster, used)
    _announce(config, vocab_size, job)
    with StopSignals() as signals:
        watched = arguments.supervise
        ending = supervise(job, signals, _say) if watched else job.attempt(signals)
    outcome = ending.describe()
    client, run_id = job.client, job.plan.run_id
    if ending.code != 0:
        client.set_terminated(run_id, "FAILED")
    _report(client, config, job.run_dir, run_id, outcome)
    print(f"  to go on     {_continuation(arguments, config, job, outcome)}")
    return ending.code


def _prepare(
    arguments: argparse.Namespace,
    config: TrainConfig,
    vocab_size: int,
    cluster: Cluster,
    used: tuple[Host, ...],
) -> Job:
    """The run, new or to be continued, ready to start."""
    client = tracking.connect(
        tracking.tracking_uri(config.tracking, os.environ.get("MLFLOW_TRACKING_URI"))
    )
    experiment = tracking.experiment_of(client, config.tracking)
    check_disk(
        experiment.artifact_location,
        RUNS,
        num_parameters(config.model, vocab_size),
        config.checkpoint.keep_last,
    )
    found = None
    if arguments.resume is not None:
        found = resume_point(client, config, arguments.resume)
    if found is None:
        run_id, step = tracking.create_run(client, experiment, config).info.run_id, None
    else:
        run_id, step = found
    values = config.model_dump(mode="json")
    plan = Plan(run_id, client.tracking_uri, values, num_slots(used), step)
    return Job(client, cluster, RunDir((RUNS / run_id).resolve()), plan, config, used)


def _say(text: str) -> None:
    print(f"supervisor: {text}", flush=True)


def _announce(config: TrainConfig, vocab_size: int, job: Job) -> None:
    plan = job.plan
    size = num_parameters(config.model, vocab_size)
    step = plan.resume_step
    start = "from the start" if step is None else f"from step {step}"
    where = "" if len(job.used) == 1 else f" on {len(job.used)} hosts"
    data = config.data
    lengths = [*(stage.seq_len for stage in data.stages), data.seq_len]
    length = " then ".join(map(str, lengths))
    if data.target_len is not None:
        length += f" -> {data.target_len}"
    parallel = config.parallel
    print(
        f"{config.name}: {size / 1e6:.1f} M parameters, {length} tokens, "
        f"{plan.world_size} ranks{where} (context {parallel.context}, tensor {parallel.tensor}), "
        f"ZeRO-{parallel.zero_stage}, {parallel.precision}; run {plan.run_id} {start}",
        flush=True,
    )


def _report(
    client: MlflowClient, config: TrainConfig, run_dir: RunDir, run_id: str, outcome: str
) -> None:
    """Draw the curve and say where everything is."""
    fault = write_curve(run_dir.read_metrics(), config.name, run_dir.curve_file)
    if fault is None:
        client.log_artifact(run_id, str(run_dir.curve_file))
    steps = [entry.step for entry in Catalog(client, run_id).committed()]
    print(f"\nrun {run_id} {outcome}")
    print(f"  checkpoints  {', '.join(f'step {step}' for step in steps) or 'none'}")
    print(f"  loss curve   {run_dir.curve_file if fault is None else fault}")
    print(f"  MLflow       {_program('mlflow')} ui --backend-store-uri {client.tracking_uri}")


def _continuation(
    arguments: argparse.Namespace, config: TrainConfig, job: Job, outcome: str
) -> str:
    """The command that goes on with this run; a finished one needs more steps."""
    words = [_program("haloformer"), "train", arguments.config, *arguments.overrides]
    if outcome == "finished":
        words = [word for word in words if not word.startswith("steps=")]
        words.append(f"steps={config.steps * 2}")
    if arguments.hostfile is not None:
        words += ["--hostfile", str(arguments.hostfile)]
    if arguments.launcher is not None:
        words += ["--launcher", arguments.launcher]
    if arguments.supervise:
        words.append("--supervise")
    return " ".join([*words, "--ranks", str(num_slots(job.used)), "--resume", job.plan.run_id])


def _program(name: str) -> str:
    """A command as the user can type it here: beside the one that was typed."""
    typed = Path(sys.argv[0])
    return str(typed.with_name(name)) if typed.name == "haloformer" else name
