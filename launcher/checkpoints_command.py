"""``haloformer checkpoints``: what a run could be resumed from."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher.catalog import Catalog
from haloformer.launcher.known_runs import RUNS, find_run
from haloformer.launcher.manifest import Manifest
from haloformer.launcher.run_dir import RunDir

# Ranks beat once a second; a shared filesystem may show it late.
_ALIVE_S = 60.0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``checkpoints``."""
    parser = commands.add_parser(
        "checkpoints",
        help="list the committed checkpoints of a run, newest first",
        description="List the committed checkpoints of a run, newest first. Exit code 2 if "
        "--verify finds a damaged one. --prune frees what a run left that was killed.",
        epilog="example: haloformer checkpoints latest --verify",
    )
    parser.add_argument("run", metavar="RUN_ID|latest")
    parser.add_argument("--verify", action="store_true", help="read every file, compare its hash")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="delete what its recipe does not keep, damaged ones and half-written ones; the newest "
        "sound one stays",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--experiment",
        default=TrackingConfig().experiment,
        help="where to look for the latest run (default %(default)s)",
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0, or 2 if a checkpoint is damaged."""
    known = find_run(arguments.run, arguments.experiment)
    run_id = known.run_id
    catalog = Catalog(known.artifacts(), run_id)
    if arguments.prune:
        _prune(catalog, RunDir(RUNS / run_id))
    rows = [
        _describe(manifest, catalog.verify(manifest) if arguments.verify else None)
        for manifest in catalog.committed()
    ]
    if arguments.json:
        print(json.dumps({"run_id": run_id, "checkpoints": rows}, indent=1))
    elif not rows:
        print(f"run {run_id} has no committed checkpoint")
    for row in [] if arguments.json else rows:
        verdict = row["fault"] or ("verified" if arguments.verify else "committed")
        print(
            f"step {row['step']}  {row['size_bytes'] / 2**20:.1f} MiB  {row['layout']}  {verdict}"
        )
    return 2 if any(row["fault"] for row in rows) else 0


def _prune(catalog: Catalog, run_dir: RunDir) -> None:
    """Delete what a finished or killed run need not keep.

    Raises:
        ValueError: If the run is training, or that cannot be known here.
    """
    idle = run_dir.seconds_since_beat()
    if idle is None:
        raise ValueError(
            f"--prune: {run_dir.path} knows no rank of the run, so whether it is training cannot "
            "be known here; prune where the run was started"
        )
    if idle < _ALIVE_S:
        raise ValueError(
            f"--prune: run {catalog.run_id} is training (a rank gave a sign of life {idle:.0f} s "
            "ago) and prunes by itself; stop it first"
        )
    newest = catalog.newest_valid()
    if newest is None:
        raise ValueError(f"--prune: run {catalog.run_id} has no sound checkpoint; nothing deleted")
    before = catalog.steps()
    keep = newest.train_config().checkpoint
    catalog.prune(newest, keep.keep_last, keep.keep_every)
    gone = sorted(set(before) - set(catalog.steps()))
    print(
        f"deleted {', '.join(f'step {step}' for step in gone) or 'no step'} of run "
        f"{catalog.run_id}",
        file=sys.stderr,
    )


def _describe(manifest: Manifest, fault: str | None) -> dict[str, Any]:
    layout = manifest.layout
    return {
        "step": manifest.step,
        "size_bytes": manifest.size,
        "layout": f"data {layout.data} x context {layout.context} x tensor {layout.tensor}, "
        f"ZeRO-{layout.zero_stage}, {layout.precision}",
        "fault": fault,
    }
