"""Models started from a folder on real ranks: held-out loss, then a few steps."""

import os

import torch
import torch.distributed

from haloformer.configs.load import parse_config
from haloformer.launcher.engine import (
    backward,
    build_engine,
    grad_norm,
    rank_loss,
    set_learning_rate,
)
from haloformer.launcher.init_from import load_start
from haloformer.launcher.phases import open_phase
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.tasks import task_of
from haloformer.launcher.topology import Layout, build_topology, destroy_topology
from haloformer.launcher.trainer import evaluate
from haloformer.model.dropout_sites import DropoutStep

STEPS = 3


def walk(rank, world, recipe, layouts):
    """{(data, context, tensor, ZeRO stage): (what was said, held-out loss, [(loss, norm)])}."""
    return {layout: start(recipe, *layout) for layout in layouts}


def start(recipe, data, context, tensor, stage):
    parallel = {"context": context, "tensor": tensor, "zero_stage": stage}
    config = parse_config({**recipe, "parallel": parallel}, "recipe")
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    init_distributed()
    topology = build_topology(Layout(data, context, tensor))
    task = task_of(config)
    opened = open_phase(task, config.phase_at(0), topology)
    torch.manual_seed(config.seed)
    facts = opened.train.facts
    model = task.build_model(config, facts.vocab_size, topology, len(facts.labels))
    said = load_start(model, config, topology)
    engine = build_engine(model, config, topology)
    held_out, _ = evaluate(engine, task, opened.held_out, config, topology)
    history = []
    for step in range(STEPS):
        batch = opened.train.next_batch()
        counted = torch.tensor(task.num_targets(batch))
        torch.distributed.all_reduce(counted, group=topology.data_group)
        set_learning_rate(engine, 1e-3)
        engine.train()
        total = torch.zeros((), dtype=torch.float64)
        for inputs in task.micro_batches(batch, config.batch.micro_batch, topology):
            output = engine(*inputs, DropoutStep(config.seed, step))
            backward(engine, rank_loss(output.loss_sum, counted.item(), topology))
            engine.step()
            total += output.loss_sum.detach().double()
        torch.distributed.all_reduce(total, group=topology.data_context_group)
        history.append((total.item() / counted.item(), grad_norm(engine)))
    opened.close()
    engine.destroy()
    destroy_topology(topology)
    return said, held_out, history
