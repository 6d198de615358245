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
from haloformer.launcher.catalog import Catalog, check_disk
from haloformer.launcher.launch import choose_port, launch_ranks
from haloformer.launcher.plot import write_curve
from haloformer.launcher.run_dir import Plan, RunDir
from haloformer.launcher.sources import check_data

RUNS = Path("runs")

# What may differ between a run and its continuation: none of it changes what a step computes,
# but for steps, which move the learning rate of the steps to come as people want by it.
_FREE_ON_RESUME = (
    *("parallel.", "checkpoint.", "eval.", "tracking.", "steps"),
    *("batch.micro_batch", "data.on_corrupt", "data.cache.", "data.prefetch", "data.workers"),
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``train``."""
    parser = commands.add_parser(
        "train",
        help="train a recipe on this machine",
        description="Check a recipe, start its ranks under DeepSpeed and train.",
        epilog="example: haloformer train enwiki_mlm steps=300 parallel.zero_stage=2 --ranks 2",
    )
    parser.add_argument("config", help="recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    parser.add_argument("--ranks", type=int, help="processes (default: what the recipe needs)")
    parser.add_argument(
        "--resume", metavar="RUN_ID|latest", help="continue from the newest good checkpoint"
    )
    parser.add_argument("--master-port", type=int, help="port of rank 0 (default: a free one)")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = load_config(arguments.config, arguments.overrides)
    ranks = arguments.ranks
    if ranks is None:
        ranks = config.parallel.context * config.parallel.tensor
    check_world(config, ranks)
    vocab_size = check_data(config)
    port = choose_port(arguments.master_port)
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
    if arguments.resume is None:
        run_id, step = tracking.create_run(client, experiment, config).info.run_id, None
    else:
        run_id, step = _resume_point(client, config, arguments.resume)
    run_dir = RunDir((RUNS / run_id).resolve())
    run_dir.create()
    run_dir.write_plan(
        Plan(run_id, client.tracking_uri, config.model_dump(mode="json"), ranks, step)
    )
    _announce(config, vocab_size, ranks, run_id, step)
    code = launch_ranks(run_dir, ranks, port)
    outcome = _outcome(run_dir, code)
    if code != 0:
        client.set_terminated(run_id, "FAILED")
    _report(client, config, run_dir, run_id, outcome)
    again = _continuation(arguments, config, ranks, run_id, outcome)
    print(f"  to go on     {again}")
    return code if code in (0, 2) else 1


def _resume_point(client: MlflowClient, config: TrainConfig, wanted: str) -> tuple[str, int]:
    """The run to continue and the step of its newest good checkpoint.

    Raises:
        ValueError: If there is none, or the recipe differs where a continuation must not.
    """
    if wanted == "latest":
        runs = tracking.runs_newest_first(client, config.tracking.experiment, config.name)
        candidates = [run.info.run_id for run in runs]
    else:
        candidates = [tracking.find_run(client, wanted).info.run_id]
    for run_id in candidates:
        newest = Catalog(client, run_id).newest_valid()
        if newest is None:
            continue
        # Through the schema: a key that is newer than the checkpoint had its default then.
        _check_same(config, newest.train_config().model_dump(mode="json"), run_id)
        if newest.step >= config.steps:
            raise ValueError(
                f"run {run_id} has already trained {newest.step} of {config.steps} steps; "
                f"raise steps to go on, such as steps={newest.step * 2}"
            )
        tracking.reopen_run(client, run_id)
        return run_id, newest.step
    raise ValueError(
        f"--resume {wanted}: no committed checkpoint found; start afresh without --resume"
    )


def _check_same(config: TrainConfig, saved: dict[str, object], run_id: str) -> None:
    now = dict(tracking.flatten(config.model_dump(mode="json")))
    then = dict(tracking.flatten(saved))
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"--resume {run_id}: the recipe has changed: {'; '.join(changed)}; "
            "set the old values back, or start a new run without --resume"
        )


def _announce(
    config: TrainConfig, vocab_size: int, ranks: int, run_id: str, step: int | None
) -> None:
    size = num_parameters(config.model, vocab_size)
    start = "from the start" if step is None else f"from step {step}"
    data = config.data
    lengths = [*(stage.seq_len for stage in data.stages), data.seq_len]
    length = " then ".join(map(str, lengths))
    if data.target_len is not None:
        length += f" -> {data.target_len}"
    print(
        f"{config.name}: {size / 1e6:.1f} M parameters, {length} tokens, "
        f"{ranks} ranks (context {config.parallel.context}, tensor {config.parallel.tensor}), "
        f"ZeRO-{config.parallel.zero_stage}, {config.parallel.precision}; run {run_id} {start}",
        flush=True,
    )


def _outcome(run_dir: RunDir, code: int) -> str:
    """How the ranks ended: finished, stopped after a step, or failed."""
    state = run_dir.read_state()
    if code != 0:
        return f"failed with exit code {code}"
    assert state is not None, "ranks that end well say how far they came"
    return "finished" if state[0] == "finished" else f"stopped after step {state[1]}"


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
    arguments: argparse.Namespace, config: TrainConfig, ranks: int, run_id: str, outcome: str
) -> str:
    """The command that goes on with this run; a finished one needs more steps."""
    words = [_program("haloformer"), "train", arguments.config, *arguments.overrides]
    if outcome == "finished":
        words = [word for word in words if not word.startswith("steps=")]
        words.append(f"steps={config.steps * 2}")
    return " ".join([*words, "--ranks", str(ranks), "--resume", run_id])


def _program(name: str) -> str:
    """A command as the user can type it here: beside the one that was typed."""
    typed = Path(sys.argv[0])
    return str(typed.with_name(name)) if typed.name == "haloformer" else name
