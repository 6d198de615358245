"""``haloformer checkpoints``: what a run could be resumed from."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher import tracking
from haloformer.launcher.catalog import Catalog
from haloformer.launcher.known_runs import KnownRun, find_runs
from haloformer.launcher.manifest import Manifest


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``checkpoints``."""
    parser = commands.add_parser(
        "checkpoints",
        help="list the committed checkpoints of a run, newest first",
        description="List the committed checkpoints of a run, newest first. Exit code 2 if "
        "--verify finds a damaged one.",
        epilog="example: haloformer checkpoints latest --verify",
    )
    parser.add_argument("run", metavar="RUN_ID|latest")
    parser.add_argument("--verify", action="store_true", help="read every file, compare its hash")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--experiment",
        default=TrackingConfig().experiment,
        help="where to look for the latest run (default %(default)s)",
    )
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0, or 2 if a checkpoint is damaged."""
    uri = tracking.tracking_uri(TrackingConfig(), os.environ.get("MLFLOW_TRACKING_URI"))
    known = _find(uri, arguments.run, arguments.experiment)
    run_id = known.run_id
    catalog = Catalog(known.artifacts(), run_id)
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


def _find(uri: str, wanted: str, experiment: str) -> KnownRun:
    known = next(find_runs(wanted, TrackingConfig(experiment=experiment), uri), None)
    if known is None:
        raise tracking.TrackingError(
            f"no run in experiment {experiment} at {uri}; train one first, or name another with "
            "--experiment"
        )
    return known


def _describe(manifest: Manifest, fault: str | None) -> dict[str, Any]:
    layout = manifest.layout
    return {
        "step": manifest.step,
        "size_bytes": manifest.size,
        "layout": f"data {layout.data} x context {layout.context} x tensor {layout.tensor}, "
        f"ZeRO-{layout.zero_stage}, {layout.precision}",
        "fault": fault,
    }
