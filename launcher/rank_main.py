"""What one rank of a run does, from its first beat to its exit code."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn

from haloformer.configs.load import check_world
from haloformer.launcher import throughput
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.commit import CheckpointError
from haloformer.launcher.counting import counted
from haloformer.launcher.engine import build_engine
from haloformer.launcher.init_from import load_start
from haloformer.launcher.phases import OpenPhase, open_phase
from haloformer.launcher.progress import StepProgress
from haloformer.launcher.pulse import Pulse
from haloformer.launcher.run_dir import RunDir
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.tasks import Task, task_of
from haloformer.launcher.topology import Layout, Topology, build_topology
from haloformer.launcher.tracker import Tracker
from haloformer.launcher.trainer import StopRequest, Trainer


def main() -> int:
    """Train, or evaluate; returns the exit code.

    Returns:
        0 done or stopped as asked, 2 the user's input, 1 our fault.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="the start of the run it belongs to")
    parser.add_argument("--local_rank", type=int, required=True, help="set by the runner")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    run_dir = RunDir(arguments.run_dir)
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(message)s")
    stop = StopRequest()
    _stop_on_signals(stop)
    pulse = Pulse(run_dir, rank, arguments.attempt, stop.ask)
    pulse.start()
    code = 0
    try:
        if run_dir.read_plan().evaluation is None:
            train(run_dir, stop, pulse)
        else:
            # Its libraries are not training's.
            from haloformer.launcher.evaluate_worker import run_evaluation

            run_evaluation(run_dir, stop, pulse)
    except CheckpointError as error:  # the disk's or the server's, not the user's: worth a retry
        _complain(f"rank {rank}: error: {error}")
        code = 1
    except ValueError as error:
        _complain(f"rank {rank}: error: {error}")
        code = 2
    except Exception as error:
        # When one of many ranks dies, its own words must not drown in tracebacks of the others.
        text = _lost_peer(error) or f"\n{traceback.format_exc()}"
        _complain(f"rank {rank}: {text}")
        code = 1
    pulse.end(code)
    if code != 0:
        # A thread that writes a checkpoint may wait for a rank that is gone, for hours.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    return code


def train(run_dir: RunDir, stop: StopRequest, pulse: Pulse) -> None:
    """Build everything that the plan asks for, and train."""
    plan = run_dir.read_plan()
    config = plan.train_config()
    timeout = timedelta(seconds=config.parallel.collective_timeout)
    init_distributed(timeout)
    data_size = check_world(config, dist.get_world_size())
    topology = build_topology(
        Layout(data=data_size, context=config.parallel.context, tensor=config.parallel.tensor),
        timeout,
    )
    first = topology.rank == 0
    step = 0 if plan.resume_step is None else plan.resume_step
    task, phase = task_of(config), config.phase_at(step)
    opened = open_phase(task, phase, topology)
    model, origin = _build_model(task, opened, topology, fresh=plan.resume_step is None)
    engine = build_engine(model, phase.config, topology)
    artifacts = ArtifactFolder(plan.artifact_uri, plan.tracking_uri)
    store = CheckpointStore(artifacts, plan.run_id, config, run_dir.staging, topology)
    if plan.resume_step is not None:
        opened.go_on(store.load(engine, plan.resume_step))
    if first:  # records of steps that are about to be trained again, or for the first time
        run_dir.cut_metrics(-1 if plan.resume_step is None else step)
    phases = config.all_phases() if config.phases else ()
    trainer = Trainer(
        config=config,
        topology=topology,
        engine=engine,
        task=task,
        opened=opened,
        store=store,
        run_dir=run_dir,
        tracker=Tracker(run_dir.path, plan.resume_step, phases) if first else None,
        progress=StepProgress(config.steps, step, every=10) if first else None,
        stop=stop,
        pulse=pulse,
        peak_flops=_peak_flops(topology),
    )
    # Its thread would end with the process as well; here it ends before the groups go down.
    with contextlib.closing(trainer), trainer.progress or contextlib.nullcontext():
        if trainer.progress is not None:
            trainer.progress.say(f"training on {counted(dist.get_world_size(), 'rank')}")
            if origin is not None:
                trainer.progress.say(origin)
        trainer.run(step)
    dist.barrier()
    dist.destroy_process_group()


def _build_model(
    task: Task, opened: OpenPhase, topology: Topology, *, fresh: bool
) -> tuple[nn.Module, str | None]:
    """The model with its first weights, and where they are from if they are not random.

    Args:
        task: Of the recipe.
        opened: The phase that is trained first.
        topology: Of the ranks.
        fresh: Whether the run starts; a checkpoint would replace what a folder holds.
    """
    config, facts = opened.phase.config, opened.train.facts
    torch.manual_seed(config.seed)  # the same weights on every rank and every layout
    model = task.build_model(config, facts.vocab_size, topology, len(facts.labels))
    if config.init_from is None or not fresh:
        return model, None
    return model, load_start(model, config, topology)


def _lost_peer(error: Exception) -> str | None:
    """One line on an error that only says that another rank is gone, None for any other."""
    # gloo's are plain RuntimeErrors that begin with a file of its source.
    if isinstance(error, dist.DistError) or "/gloo/transport/" in str(error):
        said = " ".join(str(error).split())[:300]
        return f"a collective failed, most likely because another rank is gone: {said}"
    return None


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever is not there to read it, the last beat must follow
        print(text, file=sys.stderr, flush=True)


def _peak_flops(topology: Topology) -> float:
    """FLOP/s of all ranks together, 0.0 when unknown."""
    # All ranks measure at once, so that ranks that share cores see the share they will have.
    peak = torch.tensor([throughput.peak_flops(topology.device)], dtype=torch.float64)
    peak = peak.to(topology.device)
    dist.all_reduce(peak)
    return peak.item()


def _stop_on_signals(stop: StopRequest) -> None:
    def ask(signum: int, frame: FrameType | None) -> None:
        stop.ask()

    signal.signal(signal.SIGTERM, ask)
    # A terminal sends Ctrl-C to the launcher as well; the launcher turns it into SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
