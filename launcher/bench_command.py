"""``haloformer bench``: how fast the attention and whole steps are here, beside their peers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

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
        "tokens) and an LED (2 + 2 layers x 768, 16,384 tokens in, 256 out): ours on two "
        "context-parallel ranks of one thread, transformers in one process of two threads. Parity "
        "first. About ten minutes on two cores that have nothing else to do; needs 12 GiB.",
        epilog="example: haloformer bench step --cases mlm --json step.json",
    )
    step.add_argument("--cases", default="mlm,led", help="mlm, led, or both with a comma (default)")
    step.add_argument("--size", choices=("real", "tiny"), default="real")
    step.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not")
    step.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="of ours (default: led full)"
    )
    step.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
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
    """Run ``bench step``; returns 0, or 1 if parity or a contender fails."""
    from dataclasses import replace

    from haloformer.launcher import bench_step
    from haloformer.launcher.bench_step_cases import SIZES

    known = SIZES[arguments.size]
    names = arguments.cases.split(",")
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"--cases names {strange[0]!r}; known are {', '.join(known)}")
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}; it must be at least 1")
    _check_folder(arguments.json)
    cases = [case for name, case in known.items() if name in names]
    if arguments.recompute is not None:
        cases = [replace(case, recompute=arguments.recompute) for case in cases]
    apart = arguments.size == "real"  # of the tiny ones nobody needs the numbers
    settings = bench_step.StepSettings(tuple(cases), arguments.steps, weigh_apart=apart)
    try:
        report = bench_step.measure(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except bench_step.StepBenchError as error:
        print(f"haloformer bench: nothing is reported: {error}", file=sys.stderr)
        return 1
    report["command"] = " ".join(["haloformer", *sys.argv[1:]])
    for line in bench_step.table(report):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


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
