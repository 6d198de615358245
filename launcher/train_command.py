"""``haloformer train``: check everything, start the ranks, say how it ended and what to do next."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from haloformer.configs.load import check_world, load_config
from haloformer.configs.schema import TrainConfig
from haloformer.configs.sizes import num_parameters
from haloformer.data_pipeline.index import load_index
from haloformer.launcher import tracking
from haloformer.launcher.attempt import StopSignals
from haloformer.launcher.catalog import Catalog, check_disk
from haloformer.launcher.cluster import Cluster
from haloformer.launcher.clusters import add_cluster_options, cluster_of
from haloformer.launcher.counting import counted
from haloformer.launcher.hosts import Host, fill, num_slots
from haloformer.launcher.known_runs import RUNS, KnownRun, start_run
from haloformer.launcher.model_artifact import spool_model
from haloformer.launcher.plot import write_curve
from haloformer.launcher.progress import to_whoever_reads
from haloformer.launcher.resume import AlreadyTrainedError, more_steps, resume_point
from haloformer.launcher.run_dir import Plan, RunDir
from haloformer.launcher.run_page import describe_run, lengths_of
from haloformer.launcher.sources import check_data
from haloformer.launcher.spool import Spool
from haloformer.launcher.supervise import Job, supervise
from haloformer.launcher.sync import tell_server


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
    add_cluster_options(parser, "what the recipe needs; on several hosts, all slots")
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
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = load_config(arguments.config, arguments.overrides)
    cluster, ranks = cluster_of(arguments, config, RUNS)
    check_world(config, ranks)
    vocab_size = check_data(config)
    used = fill(cluster.hosts, ranks)
    cluster.check(used)
    uri = tracking.tracking_uri(config.tracking, os.environ.get("MLFLOW_TRACKING_URI"))
    try:
        client, found = _check(arguments, config, vocab_size, uri)
    except AlreadyTrainedError as done:
        if arguments.resume != "auto":
            raise
        print(f"nothing to do: {done}")  # a job that came back into the queue at its very end
        return 0
    # From here on there is a run, whose end has to be told.
    with StopSignals() as signals:
        job = _open_run(client, uri, config, found, cluster, used)
        _announce(config, vocab_size, job)
        watched = arguments.supervise
        try:
            ending = supervise(job, signals, _say) if watched else job.attempt(signals)
        except ValueError:  # a host has gone just now, or too few are left
            Spool(job.run_dir.path).add_status("FAILED")
            tell_server(job.run_dir.path)
            raise
    outcome = ending.describe()
    if ending.code != 0:
        Spool(job.run_dir.path).add_status("FAILED")
    elif job.run_dir.read_state() is None:  # stopped before there was a rank to tell it
        Spool(job.run_dir.path).add_status("KILLED")
    resumable = _report(config, job, outcome)
    command = _next_command(arguments, config, job, outcome, resumable)
    _tell(f"  {'to go on   ' if resumable else 'once more  '}  {command}")
    return ending.code


def _check(
    arguments: argparse.Namespace, config: TrainConfig, vocab_size: int, uri: str
) -> tuple[MlflowClient | None, tuple[KnownRun, int] | None]:
    """The tracking server, None while it is away, and the run to go on with and its step if any."""
    client = _server(uri)
    location = str(RUNS)
    if client is not None:
        location = tracking.experiment_of(client, config.tracking).artifact_location
    size = num_parameters(config.model, vocab_size)
    check_disk(location, RUNS, size, config.checkpoint.keep_last)
    found = None if arguments.resume is None else resume_point(uri, config, arguments.resume)
    if found is None and config.init_from is not None:
        # It brings torch along, seconds that other runs need not wait for.
        from haloformer.launcher.init_from import check_start

        check_start(config, load_index(config.data.corpora[0].path, config.data.cache))
    return client, found


def _open_run(
    client: MlflowClient | None,
    uri: str,
    config: TrainConfig,
    found: tuple[KnownRun, int] | None,
    cluster: Cluster,
    used: tuple[Host, ...],
) -> Job:
    """The run, new or to be continued, ready to start."""
    if found is None:
        index = load_index(config.data.corpora[0].path, config.data.cache)
        known, step = start_run(client, uri, config.tracking, config.name, RUNS), None
        spool = Spool((RUNS / known.run_id).resolve())
        describe_run(spool, config, index, num_slots(used), sys.argv)
    else:
        known, step = found
    run_dir = RunDir((RUNS / known.run_id).resolve())
    run_dir.path.mkdir(parents=True, exist_ok=True)
    known.save(run_dir.path)
    values = config.model_dump(mode="json")
    plan = Plan(known.run_id, uri, known.artifact_uri, values, num_slots(used), step)
    return Job(known, cluster, run_dir, plan, config, used)


def _server(uri: str) -> MlflowClient | None:
    """A client, None while the server is away: training does not wait for it."""
    try:
        return tracking.connect(uri)
    except tracking.TrackingAwayError as error:
        print(f"warning: {error}. Training starts without it.", file=sys.stderr, flush=True)
        return None


def _say(text: str) -> None:
    _tell(f"supervisor: {text}")


def _tell(text: str) -> None:
    with to_whoever_reads():
        print(text, flush=True)


def _announce(config: TrainConfig, vocab_size: int, job: Job) -> None:
    plan = job.plan
    size = num_parameters(config.model, vocab_size)
    step = plan.resume_step
    start = "from the start" if step is None else f"from step {step}"
    where = "" if len(job.used) == 1 else f" on {len(job.used)} hosts"
    data = config.data
    length = lengths_of(config)
    if data.target_len is not None:
        length += f" -> {data.target_len}"
    parallel = config.parallel
    _tell(
        f"{config.name}: {size / 1e6:.1f} M parameters, {length} tokens, "
        f"{counted(plan.world_size, 'rank')}{where} (context {parallel.context}, "
        f"tensor {parallel.tensor}), ZeRO-{parallel.zero_stage}, {parallel.precision}; "
        f"run {plan.run_id} {start}",
    )


def _report(config: TrainConfig, job: Job, outcome: str) -> bool:
    """Draw the curve, tell MLflow the rest, and say where everything is.

    Returns:
        Whether there may be a checkpoint to go on from.
    """
    run_dir, known = job.run_dir, job.known
    # It takes seconds, in which nothing else would be seen.
    _tell("the ranks have ended; writing the loss curve and what MLflow keeps")
    fault = write_curve(run_dir.read_metrics(), config.name, run_dir.curve_file)
    if fault is None:
        Spool(run_dir.path).add_artifact(run_dir.curve_file)
    model = None
    if outcome == "finished" and config.tracking.log_model:
        model = spool_model(known, run_dir.path)
    told = tell_server(run_dir.path)
    resumable, checkpoints = _checkpoints(known)
    _tell(f"\nrun {known.run_id} {outcome}")
    _tell(f"  checkpoints  {checkpoints}")
    if model is not None:
        _tell(f"  model        {model}")
    _tell(f"  loss curve   {run_dir.curve_file if fault is None else fault}")
    _tell(f"  MLflow       {_page(known.tracking_uri)}")
    if told is not None:
        _tell(f"               {told}; later: {_program('haloformer')} sync {known.run_id}")
    return resumable


def _checkpoints(known: KnownRun) -> tuple[bool, str]:
    """Whether there may be one, and which there are."""
    try:
        steps = [entry.step for entry in Catalog(known.artifacts(), known.run_id).committed()]
    except (MlflowException, OSError) as error:
        return True, f"the store does not answer ({' '.join(str(error).split())[:100]})"
    return bool(steps), ", ".join(f"step {step}" for step in steps) or "none"


def _page(uri: str) -> str:
    """How to look at the runs."""
    if uri.startswith("http"):
        return uri
    return f"{_program('mlflow')} ui --backend-store-uri {uri}"


def _next_command(
    arguments: argparse.Namespace, config: TrainConfig, job: Job, outcome: str, resumable: bool
) -> str:
    """What goes on with this run, or starts afresh; a finished run needs more steps."""
    words = [_program("haloformer"), "train", arguments.config, *arguments.overrides]
    if outcome == "finished":
        more = more_steps(config, config.steps)
        words = [word for word in words if word.partition("=")[0] != more.partition("=")[0]]
        words.append(more)
    if arguments.hostfile is not None:
        words += ["--hostfile", str(arguments.hostfile)]
    if arguments.launcher is not None:
        words += ["--launcher", arguments.launcher]
    if arguments.master_addr is not None:
        words += ["--master-addr", arguments.master_addr]
    if arguments.master_port is not None:
        words += ["--master-port", str(arguments.master_port)]
    if arguments.supervise:
        words.append("--supervise")
    words += ["--ranks", str(num_slots(job.used))]
    if resumable:
        words += ["--resume", job.plan.run_id]
    return shlex.join(words)


def _program(name: str) -> str:
    """A command as the user can type it here: beside the one that was typed."""
    typed = Path(sys.argv[0])
    return str(typed.with_name(name)) if typed.name == "haloformer" else name
