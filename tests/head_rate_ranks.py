"""One optimizer step of a classifier whose head learns ten times as fast as its encoder."""

import os

import torch

from haloformer.configs.models import ClassifierConfig
from haloformer.launcher.engine import backward, build_engine, rank_loss, set_learning_rate
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.topology import Layout, build_topology, destroy_topology
from haloformer.model.classification import LongformerForSequenceClassification
from layouts import Case, tiny_config
from task_layouts import ENCODER

ENCODER_RATE, HEAD_RATE = 1e-3, 1e-2


def changes(rank, world_size):
    """Name -> largest change of an element in Adam's first step, which is the rate itself."""
    os.environ["LOCAL_RANK"] = str(rank)
    init_distributed()
    topology = build_topology(Layout(data=world_size, context=1))
    config = tiny_config(Case(world_size, 1, 1))
    rates = {"learning_rate": 5 * ENCODER_RATE, "head_learning_rate": 5 * HEAD_RATE}
    optim = config.optim.model_copy(update={**rates, "weight_decay": 0.0, "clip_norm": 1e3})
    batch = config.batch.model_copy(update={"global_batch": 1, "micro_batch": 1})
    config = config.model_copy(update={"optim": optim, "batch": batch})
    torch.manual_seed(1)
    model = LongformerForSequenceClassification(ClassifierConfig(**ENCODER), 50, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = build_engine(model, config, topology)
    set_learning_rate(engine, ENCODER_RATE)
    # A gradient of ones everywhere: what is under test is the rate, not the model.
    loss = sum(p.sum() for p in engine.module.parameters())
    backward(engine, rank_loss(loss, world_size, topology))
    engine.step()
    moved = {
        name: (p.detach() - before[name]).abs().max().item()
        for name, p in engine.module.named_parameters()
    }
    destroy_topology(topology)
    return moved
