"""``haloformer evaluate``: scores of a trained model on held-out data, by ranks as in training."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haloformer.configs.schema import TrackingConfig
from haloformer.launcher.attempt import StopSignals, run_attempt
from haloformer.launcher.cluster import Cluster
from haloformer.launcher.clusters import add_cluster_options, cluster_of
from haloformer.launcher.counting import counted
from haloformer.launcher.hosts import Host, fill
from haloformer.launcher.known_runs import RUNS
from haloformer.launcher.run_dir import SCORES, Plan, RunDir, write_json_atomically

if TYPE_CHECKING:
    from haloformer.launcher.evaluators import Evaluator

# Options that only some kinds of models have a use for; None where one is not given.
OPTIONS_OF_KINDS = ("limit", "beams", "max_length", "no_repeat_ngram_size", "length", "stride")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        help="score a trained model on held-out data",
        description="Score a checkpoint on a folder of held-out data: a longformer_mlm by bits "
        "per character and accuracy at masked places, a char_lm by bits per character in "
        "overlapping windows, a led by ROUGE of what it writes beside the first sentences of the "
        "source, the others by accuracy, exact match, F1 and CoNLL F1. The scores go into the run.",
        epilog="example: haloformer evaluate latest --data data/wiki_lead/eval --json rouge.json",
    )
    parser.add_argument("model", metavar="RUN_ID|latest|HF_DIR")
    parser.add_argument(
        "--data", required=True, metavar="DIR",
        help="made by prepare, not trained on; a path, http(s):// or s3://",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    parser.add_argument(
        "--limit", type=_count, metavar="N",
        help="only the first N sequences, pairs, examples, or windows of a char_lm (default: all)",
    )  # fmt: skip
    parser.add_argument("--beams", type=_count, help="of a led: hypotheses; 1 is greedy (default)")
    parser.add_argument(
        "--max-length", type=_count, metavar="N",
        help="of a led: most tokens of an answer, its start token included (default: "
        "data.target_len)",
    )  # fmt: skip
    parser.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N",
        help="of a led: no N tokens in a row come twice in an answer; 0 = may (default 3)",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=_count, metavar="N",
        help="of a char_lm: tokens of a window (default 32256, the paper's)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=_count, metavar="N",
        help="of a char_lm: tokens by which the window moves on, and of which it scores its last "
        "(default 512, the paper's)",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    parser.add_argument(
        "--experiment",
        default=TrackingConfig().experiment,
        help="where to look for the latest run (default %(default)s)",
    )
    add_cluster_options(parser, "those of one sequence in the recipe; on several hosts, all slots")
    parser.set_defaults(run_command=run)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code, 130 when it was stopped as asked."""
    file = arguments.json
    if file is not None and (file.is_dir() or not file.parent.is_dir()):  # not hours from now
        raise ValueError(f"--json {file}: not a file in a folder that is there; make the folder")
    # They bring torch along, seconds that a wrong word in the command need not wait for.
    from haloformer.launcher.evaluate_kinds import evaluator_of
    from haloformer.launcher.evaluate_subject import open_subject, with_mesh

    subject = open_subject(arguments.model, arguments.step, arguments.experiment, arguments.data)
    evaluator = evaluator_of(subject.config)
    settings = evaluator.settings(subject.config, _given(arguments, evaluator))
    # Without --ranks one machine gets those of one sequence, as the recipe has them.
    cluster, ranks = cluster_of(arguments, with_mesh(subject.config, evaluator, None), RUNS)
    config = with_mesh(subject.config, evaluator, ranks)
    used = fill(cluster.hosts, ranks)
    cluster.check(used)
    parallel = config.parallel
    print(
        f"{subject.name}: on {arguments.data} with {counted(ranks, 'rank')} (data "
        f"{ranks // (parallel.context * parallel.tensor)}, context {parallel.context}, tensor "
        f"{parallel.tensor})",
        flush=True,
    )
    start = time.perf_counter()
    code, found = _start_ranks(cluster, used, subject.plan(config, settings, ranks))
    if found is None:
        return code
    seconds = time.perf_counter() - start
    print(f"{subject.name}: {found['count']:,} {evaluator.unit} of {arguments.data}")
    print(table(found["scores"], evaluator.decimals))
    for note in found["notes"]:
        print(note)
    print(f"{seconds:.1f} s; {subject.log(found['scores'])}")
    if file is not None:
        record = {"data": arguments.data, "count": found["count"], "scores": found["scores"]}
        records = {evaluator.records_key: found["records"]}
        write_json_atomically(file, {**subject.identity(), **record, **found["facts"], **records})
        print(f"wrote {file}")
    return 0


def _given(arguments: argparse.Namespace, evaluator: Evaluator) -> dict[str, Any]:
    """The options of kinds of models that were given.

    Raises:
        ValueError: If one is for another kind.
    """
    given = {name: getattr(arguments, name) for name in OPTIONS_OF_KINDS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in evaluator.options:
            known = ", ".join(_option(option) for option in evaluator.options)
            raise ValueError(f"{_option(name)} is not for this kind of model, which reads {known}")
    return given


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _start_ranks(
    cluster: Cluster, used: Sequence[Host], plan: Plan
) -> tuple[int, dict[str, Any] | None]:
    """Exit code, and what the ranks found; None if they failed or were stopped."""
    # Beside the runs, because all hosts see that folder; the dot says that it is none of them.
    run_dir = RunDir(RUNS.resolve() / f".evaluate-{secrets.token_hex(8)}")
    run_dir.path.mkdir(parents=True)
    # After a failure on several hosts it stays: ranks that were cut off read there that it is over.
    stays = len(used) > 1
    try:
        with StopSignals("ending") as signals:
            ending = run_attempt(cluster, run_dir, plan, used, signals)
        if ending.code != 0:
            print(f"haloformer: error: the evaluation {ending.describe()}", file=sys.stderr)
            return ending.code, None
        stays = False
        assert ending.state is not None
        if ending.state[0] == "finished":
            return 0, json.loads((run_dir.path / SCORES).read_text(encoding="utf-8"))
        print("haloformer: stopped; nothing was scored", file=sys.stderr)
        return 130, None
    finally:
        if not stays:
            shutil.rmtree(run_dir.path)


def table(scores: dict[str, dict[str, float]], decimals: int) -> str:
    """Metrics side by side, a line per candidate."""
    metrics = list(next(iter(scores.values())))
    width = max(len(name) for name in scores)
    widths = [max(9, len(metric) + 2) for metric in metrics]
    cells = (f"{metric:>{wide}}" for metric, wide in zip(metrics, widths, strict=True))
    lines = [" " * width + "".join(cells)]
    for name, values in scores.items():
        cells = (
            f"{values[metric]:{wide}.{decimals}f}"
            for metric, wide in zip(metrics, widths, strict=True)
        )
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
