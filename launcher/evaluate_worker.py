"""One rank of an evaluation: the weights of a checkpoint, no optimizer, no engine.

::

    run folder      plan.json   recipe with the sizes of these ranks, checkpoint, Order
                    scores.json what rank 0 found, for the command

It is started as a rank of training is, by every launcher: ``worker`` looks into the plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.index import load_index
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.evaluate_kinds import evaluator_of
from haloformer.launcher.evaluate_pace import EvaluationStoppedError, Pace
from haloformer.launcher.evaluators import Outcome, Work
from haloformer.launcher.pulse import Pulse
from haloformer.launcher.run_dir import SCORES, Plan, RunDir, write_json_atomically
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.tasks import Task, task_of
from haloformer.launcher.topology import Layout, Topology, build_topology
from haloformer.launcher.trainer import StopRequest
from haloformer.model.convert import load_pretrained
from haloformer.model.plain import PlainMaskedLM
from haloformer.model.plain_led import PlainLed


@dataclass(frozen=True)
class Order:
    """What the ranks are to do beside what the plan says.

    Attributes:
        folder: A transformers folder with the weights; None for the checkpoint of the plan.
        settings: Of the evaluator.
    """

    folder: str | None
    settings: dict[str, Any]


def run_evaluation(run_dir: RunDir, stop: StopRequest, pulse: Pulse) -> None:
    """Evaluate as the plan says, and leave what was found in the folder."""
    plan = run_dir.read_plan()
    assert plan.evaluation is not None
    config, order = plan.train_config(), Order(**plan.evaluation)
    timeout = timedelta(seconds=config.parallel.collective_timeout)
    init_distributed(timeout)
    context, tensor = config.parallel.context, config.parallel.tensor
    layout = Layout(dist.get_world_size() // (context * tensor), context, tensor)
    topology = build_topology(layout, timeout)
    task = task_of(config)
    model = load_model(plan, config, order, task, run_dir.staging, topology)
    with Pace(topology, stop, pulse) as pace:
        work = Work(config, task, topology, order.settings, pace)
        try:
            outcome = evaluate(model, work)
        except EvaluationStoppedError:
            if topology.rank == 0:
                run_dir.write_state("stopped", pace.done)
        else:
            if topology.rank == 0:
                write_json_atomically(run_dir.path / SCORES, asdict(outcome))
                run_dir.write_state("finished", pace.done)
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def evaluate(model: nn.Module, work: Work) -> Outcome:
    """What the evaluator of the model finds; collective over all ranks."""
    return evaluator_of(work.config).evaluate(model.eval(), work)


def load_model(
    plan: Plan,
    config: TrainConfig,
    order: Order,
    task: Task,
    staging: Path,
    topology: Topology,
) -> nn.Module:
    """This rank's part of the model, in fp32; collective over all ranks."""
    if order.folder is not None:
        plain = load_pretrained(order.folder)
        assert isinstance(plain, PlainMaskedLM | PlainLed), "checked by the command"
        return plain.model.to(topology.device)
    assert plan.resume_step is not None
    index = load_index(config.data.eval, config.data.cache)
    model = task.build_model(config, index.vocab_size, topology, len(index.labels))
    artifacts = ArtifactFolder(plan.artifact_uri, plan.tracking_uri)
    store = CheckpointStore(artifacts, plan.run_id, config, staging, topology)
    store.load_weights(model, plan.resume_step)
    return model.to(topology.device)
