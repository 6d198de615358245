"""``haloformer sync``: tell MLflow what it missed while it was away."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher import tracking
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.catalog import MANIFEST, Catalog, folder_of
from haloformer.launcher.known_runs import RUNS, KnownRun, find_run, read_known
from haloformer.launcher.model_artifact import FOLDER as MODEL_FOLDER
from haloformer.launcher.sender import FAULTS, Sender
from haloformer.launcher.spool import Spool


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``sync``."""
    parser = commands.add_parser(
        "sync",
        help="tell MLflow what it missed of a run while it was away",
        description="Send what a run kept for a tracking server that was away: metrics in order, "
        "each once, and the artifacts of a run that began without a server. It may be repeated.",
        epilog="example: haloformer sync latest",
    )
    parser.add_argument("run", metavar="RUN_ID|latest")
    parser.add_argument(
        "--experiment",
        default=TrackingConfig().experiment,
        help="where to look for the latest run (default %(default)s)",
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0."""
    known = find_run(arguments.run, arguments.experiment)
    if read_known(RUNS / known.run_id) is None:
        raise ValueError(
            f"run {arguments.run} has no folder in {RUNS.resolve()}; sync it where it was trained"
        )
    folder = (RUNS / known.run_id).resolve()
    try:
        sent, copied, mlflow_id = deliver(folder)
    except FAULTS as error:
        raise ValueError(
            f"run {known.run_id}: {' '.join(str(error).split())[:300]}; nothing is lost, sync "
            "again when the server is up"
        ) from error
    print(f"run {known.run_id}: {sent} records and {copied} files sent; MLflow run {mlflow_id}")
    return 0


def tell_server(folder: Path) -> str | None:
    """Deliver what is left of a run that has ended; why that did not work, None if it did."""
    try:
        deliver(folder)
    except (*FAULTS, ValueError) as error:
        return f"not all of it is there yet ({' '.join(str(error).split())[:200]})"
    return None


def deliver(folder: Path) -> tuple[int, int, str]:
    """Send the spool of a run and, if it began without a server, its artifacts.

    Args:
        folder: Of the run.

    Returns:
        Records sent, files copied, and MLflow's id of the run.

    Raises:
        ValueError: If another process sends for this run just now.
        TrackingAwayError: If the server is away.
        MlflowException: If it refuses something.
        OSError: If the store of artifacts does not answer.
    """
    spool = Spool(folder)
    with spool.sending() as mine:
        if not mine:
            raise ValueError(f"{folder.name} is training, and sends by itself")
        sender = Sender(spool)
        sent = sender.send_all()
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)  # as large as the weights
        known = read_known(folder)
        assert known is not None
        copied = 0
        if known.began_without_server:
            sender.connect()
            known = read_known(folder)
            assert known is not None and known.mlflow_id is not None
            copied = _copy_checkpoints(known)
        assert known.mlflow_id is not None
        return sent, copied, known.mlflow_id


def _copy_checkpoints(known: KnownRun) -> int:
    """Bring the server's checkpoints to those in the run's folder; how many files were sent."""
    assert known.mlflow_id is not None
    client = tracking.connect(known.tracking_uri)
    here = Catalog(known.artifacts(), known.run_id)
    there = Catalog(ArtifactFolder.of_run(client, known.mlflow_id), known.mlflow_id)
    kept = {manifest.step: manifest for manifest in here.committed()}
    copied = 0
    for step, manifest in sorted(kept.items()):
        if there.read(step) == manifest:
            continue
        folder = folder_of(step)
        for name in [*(entry.name for entry in manifest.files), MANIFEST]:  # the manifest last
            path = here.artifacts.local_path(f"{folder}/{name}")
            assert path is not None, "a run without a server keeps its artifacts in its folder"
            there.artifacts.upload(path, str(Path(folder, name).parent))
            copied += 1
    # None here is a folder that was emptied to make room, not a run that wants none.
    for step in there.steps() if kept else ():
        if step not in kept:
            there.remove(step)
    return copied
