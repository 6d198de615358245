"""``haloformer bench``: how fast the attention and whole steps are here, beside their peers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from haloformer.launcher import bench_step
    from haloformer.launcher.bench_step_cases import StepCase

# Names of bench_peers.MAKERS: importing those would load torch, for seconds, in every command.
PEERS = ("haloformer-module", "transformers-module", "transformers-maths", "dense", "flex")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``bench``."""
    parser = commands.add_parser(
        "bench", help="measure attention or training steps on this machine's CPU"
    )
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    attention = subjects.add_parser(
        "attention",
        help="time and memory of the attention op, as ratios to its peers and to the floor",
        description="Parity first: nothing is timed if it fails (exit code 1). Then time and peak "
        "memory of the op on the CPU, beside transformers' Longformer, dense attention and "
        "FlexAttention, and beside the floor: the band's FLOPs at the speed of a large matrix "
        "product. About ten minutes as it stands; compiled FlexAttention needs a C++ compiler.",
        epilog="example: haloformer bench attention --n 4096 --peers dense --json bench.json",
    )
    attention.add_argument("--n", type=_numbers, default=(4096, 16384), help="lengths, with commas")
    attention.add_argument("--window", type=int, default=512, help="two-sided window")
    attention.add_argument("--heads", type=int, default=12)
    attention.add_argument("--head-dim", type=int, default=64)
    attention.add_argument("--threads", type=int, default=2)
    attention.add_argument("--rounds", type=int, default=5, help="turns per number (a median)")
    attention.add_argument(
        "--peers",
        type=lambda text: tuple(x for x in text.split(",") if x),
        default=PEERS,
        help=f"some of {','.join(PEERS)}; default all",
    )
    attention.add_argument("--backend", default="chunks", help="who computes our op")
    attention.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    attention.add_argument("--png", type=Path, metavar="FILE", help="draw time and memory over N")
    attention.set_defaults(run_command=run)
    _add_step(subjects)


def _add_step(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    step = subjects.add_parser(
        "step",
        help="time and memory of whole training steps beside transformers'",
        description="Forward, backward and AdamW of a Longformer MLM (4 layers x 768, 4,096 "
        "tokens) and an LED (2 + 2 layers x 768, 16,384 tokens in, 256 out): ours on one rank of "
        "two threads and on two context-parallel ranks of one, transformers in one process of two "
        "threads, in turns. Parity first. A quarter of an hour on two cores that have nothing else "
        "to do (with --sweep twice that); needs 16 GiB.",
        epilog="example: haloformer bench step --cases mlm --sweep --json step.json",
    )
    step.add_argument("--cases", default="mlm,led", help="mlm, led, or both with a comma (default)")
    step.add_argument("--size", choices=("real", "tiny"), default="real")
    step.add_argument(
        "--sweep", action="store_true", help="mlm at 1K, 2K, 4K, 8K and 16K tokens, not 4K alone"
    )
    step.add_argument("--ranks", type=_numbers, default=(1, 2), help="of ours, with commas")
    step.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    step.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="of ours (default none)"
    )
    step.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    step.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: each rank has its GPU"
    )
    step.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    step.add_argument("--png", type=Path, metavar="FILE", help="draw tokens/s and memory over N")
    step.add_argument(
        "--history", type=Path, metavar="FILE", help="hold the ratios to those of earlier runs on "
        "this device and add them as a line of JSON; exit code 1 if one is below 0.85 of the "
        "median of the last five, and then no line is added"
    )  # fmt: skip
    step.set_defaults(run_command=run_step)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0, or 1 if parity fails."""
    # torch takes seconds to load: only the commands that compute wait for it.
    from haloformer.launcher import bench
    from haloformer.launcher.bench_parity import ParityError
    from haloformer.launcher.bench_report import table, write_picture

    _check(arguments)
    settings = bench.Settings(
        lengths=arguments.n,
        window=arguments.window,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        peers=arguments.peers,
        rounds=arguments.rounds,
        threads=arguments.threads,
        backend=arguments.backend,
    )
    try:
        report = bench.measure(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except ParityError as error:
        print(f"haloformer bench: parity failed, nothing is reported: {error}", file=sys.stderr)
        return 1
    report["command"] = " ".join(["haloformer", *sys.argv[1:]])
    for line in table(report):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.png is not None:
        why_not = write_picture(report, arguments.png)
        print(f"curve: {arguments.png if why_not is None else why_not}")
    return 0


def run_step(arguments: argparse.Namespace) -> int:
    """Run ``bench step``; returns 0, or 1 if parity or a contender fails or a ratio got worse."""
    from haloformer.launcher import bench_history, bench_step, bench_step_report
    from haloformer.launcher.bench_step_contender import StepBenchError

    settings = _step_settings(arguments)
    before = [] if arguments.history is None else bench_history.read(arguments.history)
    try:
        report = bench_step.measure(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except StepBenchError as error:
        print(f"haloformer bench: nothing is reported: {error}", file=sys.stderr)
        return 1
    report["command"] = " ".join(["haloformer", *sys.argv[1:]])
    for line in bench_step_report.table(report):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.png is not None:
        why_not = bench_step_report.write_picture(report, arguments.png)
        print(f"curve: {arguments.png if why_not is None else why_not}")
    if arguments.history is None:
        return 0
    entry = bench_history.line_of(report)
    worse = bench_history.regressions(entry, before)
    for fault in worse:
        print(f"haloformer bench: worse than before: {fault}", file=sys.stderr)
    if worse:
        return 1
    bench_history.append(entry, arguments.history)
    print(f"history: {arguments.history}, no ratio got worse")
    return 0


def _step_settings(arguments: argparse.Namespace) -> bench_step.StepSettings:
    """What the options ask for.

    Raises:
        ValueError: If they ask for what cannot be.
    """
    from dataclasses import replace

    from haloformer.launcher import bench_step
    from haloformer.launcher.bench_step_cases import SIZES, sweep

    known = SIZES[arguments.size]
    names = arguments.cases.split(",")
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"--cases names {strange[0]!r}; known are {', '.join(known)}")
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}; it must be at least 1")
    if min(arguments.ranks) < 1 or len(set(arguments.ranks)) < len(arguments.ranks):
        raise ValueError("--ranks takes different numbers from 1 on, 1,2 for example")
    for path in (arguments.json, arguments.png, arguments.history):
        _check_folder(path)
    if arguments.device == "cuda":
        _check_gpus(max(arguments.ranks))
    cases: list[StepCase] = []
    for name, case in known.items():
        if name in names:
            cases += sweep(case) if arguments.sweep and name == "mlm" else [case]
    if arguments.recompute is not None:
        cases = [replace(case, recompute=arguments.recompute) for case in cases]
    return bench_step.StepSettings(
        cases=tuple(replace(case, precision=arguments.precision) for case in cases),
        ranks=arguments.ranks,
        steps=arguments.steps,
        weigh_apart=arguments.size == "real",  # of the tiny ones nobody needs the numbers
        device=arguments.device,
    )


def _check_gpus(ranks: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < ranks:
        raise ValueError(f"--device cuda with {ranks} ranks needs a GPU each; torch finds {found}")


def _check(arguments: argparse.Namespace) -> None:
    for name in ("window", "heads", "head_dim", "threads", "rounds"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.window < 4 or arguments.window % 4:
        raise ValueError(f"--window {arguments.window} is not a multiple of 4; it is also halved")
    if min(arguments.n) < 2 * arguments.window:
        raise ValueError(
            f"--n {min(arguments.n)} is below two windows of {arguments.window}; take more tokens"
        )
    for name in arguments.peers:
        if name not in PEERS:
            raise ValueError(f"--peers names {name!r}; known are {', '.join(PEERS)}")
    for path in (arguments.json, arguments.png):
        _check_folder(path)


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} in; make it")
