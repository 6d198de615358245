"""Arms x seeds of one experiment: each a run of its own, then one record, one table, one plot.

A run lies in ``work/EXPERIMENT/ARM-SEED`` with a store of its own. A finished run is not run again
and one that was cut off goes on from its checkpoint, so an experiment may be stopped at any moment
and started again with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
RESULTS = HERE / "results"

Curve = list[tuple[int, float]]  # optimizer step, value


@dataclass(frozen=True)
class Arm:
    """One setting that is compared: a recipe beside this file, and what replaces its values.

    ``SEED`` in an override stands for the seed.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        value: The figure that arms are compared by.
        curve: The figure along the way, where it was measured.
    """

    arm: str
    seed: int
    value: float
    curve: Curve


def parse_arguments(description: str | None) -> argparse.Namespace:
    """``--seeds`` and ``--jobs``, as every experiment has them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one core each")
    return parser.parse_args()


def haloformer(folder: Path, *words: str) -> None:
    """Run a command in a folder; what it prints goes to ``log.txt`` there.

    Raises:
        SystemExit: If it fails, with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    program = str(Path(sys.executable).with_name("haloformer"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        code = subprocess.run(
            [program, *words], cwd=folder, stdout=out, stderr=out, env=environment, check=False
        ).returncode
    if code != 0:
        tail = log.read_bytes()[-2000:].decode(errors="replace")
        raise SystemExit(f"{folder}: haloformer {' '.join(words)} ended with {code}:\n{tail}")


def train(folder: Path, recipe: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """Train a recipe in a folder of its own, or go on where that was cut off."""
    words = ["train", str(recipe), f"seed={seed}", *overrides]
    haloformer(folder, *words, "--ranks", "1", "--resume", "auto")


def held_out(folder: Path, key: str) -> Curve:
    """The held-out values that the one run of a folder has recorded."""
    (file,) = (folder / "runs").glob("*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [(record["step"], record[key]) for record in records if key in record]


def run_arms(
    experiment: str,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    jobs: int,
    score: Callable[[Path, Arm, int], Outcome],
) -> list[Outcome]:
    """Train every arm with every seed, ``jobs`` at once, and score each; seed by seed."""
    cases = [(arm, seed) for seed in seeds for arm in arms]

    def one(case: tuple[Arm, int]) -> Outcome:
        arm, seed = case
        folder, began = WORK / experiment / f"{arm.name}-{seed}", time.monotonic()
        overrides = [override.replace("SEED", str(seed)) for override in arm.overrides]
        train(folder, HERE / f"{arm.recipe}.yaml", seed, overrides)
        outcome = score(folder, arm, seed)
        minutes = (time.monotonic() - began) / 60
        print(f"{arm.name}, seed {seed}: {outcome.value:.4f} ({minutes:.1f} min)", flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, cases))


def report(experiment: str, outcomes: Sequence[Outcome], unit: str, axis: str = "step") -> None:
    """Print the table, and write ``results/EXPERIMENT.json`` and ``.png``."""
    RESULTS.mkdir(exist_ok=True)
    names = list(dict.fromkeys(outcome.arm for outcome in outcomes))
    print(f"\n{unit}, by seed, their mean and standard deviation")
    for name in names:
        values = [outcome.value for outcome in outcomes if outcome.arm == name]
        spread = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name:<16}{' '.join(f'{v:8.4f}' for v in values)}   {fmean(values):.4f}{spread}")
    record = {
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "seeds": sorted({outcome.seed for outcome in outcomes}),
        "unit": unit,
        "axis": axis,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    (RESULTS / f"{experiment}.json").write_text(json.dumps(record, indent=1) + "\n")
    _plot(experiment, outcomes, names, unit, axis)


def commit() -> str:
    """The commit that is checked out, and whether the tree differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, check=True)
        return done.stdout.decode().strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def _plot(
    experiment: str, outcomes: Sequence[Outcome], names: Sequence[str], unit: str, axis: str
) -> None:
    """Curves where the runs have some, else a bar per arm with its seeds as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    with_curves = any(outcome.curve for outcome in outcomes)
    for number, name in enumerate(names):
        own = [outcome for outcome in outcomes if outcome.arm == name]
        if with_curves:
            for index, outcome in enumerate(own):
                look = {"color": f"C{number}", "alpha": 0.7, "label": name if index == 0 else None}
                if outcome.curve:
                    x, y = zip(*outcome.curve, strict=True)
                    axes.plot(x, y, "o-", markersize=3, **look)
                else:
                    axes.axhline(outcome.value, linestyle="--", **look)
        else:
            values = [outcome.value for outcome in own]
            axes.bar(name, fmean(values), color=f"C{number}", alpha=0.5)
            axes.plot([name] * len(values), values, "o", color=f"C{number}")
    if with_curves:
        axes.set_xlabel(axis)
        axes.legend()
    axes.set_ylabel(unit)
    axes.set_title(experiment)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / f"{experiment}.png", dpi=110)
