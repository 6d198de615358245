"""The real Longformer trained on every layout, on batches that are unkind to one rank or another.

``walk`` runs in the ranks of ``dist.run_ranks``. The step decides what the batch is like:

    step  globals                                        padding
    0     0 to 3 per sample, anywhere                    ragged
    1     two, all in the first quarter (one rank)       none
    2     none in any sample                             none
    3     one in some samples                            second half: a rank of padding only
    4     one per sample, in the last quarter            ragged
"""

import os
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.batch import Batch
from haloformer.launcher.engine import (
    backward,
    build_engine,
    grad_norm,
    rank_loss,
    set_learning_rate,
)
from haloformer.launcher.feeding import micro_batches
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.topology import Layout, build_topology, destroy_topology
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.targets import IGNORED_LABEL

VOCAB, SEQ_LEN, GLOBAL_BATCH, STEPS, MAX_GLOBALS = 61, 32, 4, 5, 3


@dataclass(frozen=True)
class Case:
    """One way to spread the same global batch."""

    data: int
    context: int
    stage: int
    micro: int
    tensor: int = 1

    def __str__(self):
        split = f"dp{self.data}_cp{self.context}_tp{self.tensor}"
        return f"{split}_zero{self.stage}_mb{self.micro}"

    @property
    def world(self):
        return self.data * self.context * self.tensor


MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]
# Accumulation 1 and 2 on every mesh.
CASES = [
    Case(d, c, stage, GLOBAL_BATCH // d // accumulation)
    for d, c in MESHES
    for stage in range(4)
    for accumulation in (1, 2)
]
CASES += [Case(1, c, stage, 2, tensor=2) for c in (1, 2) for stage in range(4)]
CASES += [Case(2, 1, stage, 2, tensor=2) for stage in (1, 3)]


def config_of(case):
    return TrainConfig.model_validate(
        {
            "name": "layouts",
            "seed": 11,
            "steps": STEPS,
            "model": {
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "ffn_size": 32,
                "max_positions": SEQ_LEN,
                "attention_window": [4, 20],
                "dilation": [1, 2],
                "activation_dropout": 0.1,
            },
            "data": {"train": "unused", "eval": "unused", "seq_len": SEQ_LEN},
            "batch": {"global_batch": GLOBAL_BATCH, "micro_batch": case.micro},
            "optim": {"learning_rate": 1e-3, "clip_norm": 0.5},
            "parallel": {
                "context": case.context,
                "tensor": case.tensor,
                "zero_stage": case.stage,
            },
            "checkpoint": {"every": 1},
        }
    )


def global_batch(step):
    """The batch of a step over all ranks, as the data pipeline would give it."""
    rng = np.random.default_rng(step)
    ids = rng.integers(5, VOCAB, (GLOBAL_BATCH, SEQ_LEN))
    lengths = np.full(GLOBAL_BATCH, SEQ_LEN)
    if step in (0, 4):
        lengths = rng.integers(SEQ_LEN // 2 + 1, SEQ_LEN + 1, GLOBAL_BATCH)
    elif step == 3:
        lengths[:] = SEQ_LEN // 2
    mask = np.arange(SEQ_LEN) < lengths[:, None]
    targets = mask & (rng.random(ids.shape) < 0.3)
    places = np.zeros((GLOBAL_BATCH, MAX_GLOBALS), np.int64)
    real = np.zeros((GLOBAL_BATCH, MAX_GLOBALS), bool)
    for sample in range(GLOBAL_BATCH):
        count = (int(rng.integers(0, 4)), 2, 0, sample % 2, 1)[step]
        low, high = (0, SEQ_LEN // 4) if step == 1 else (0, int(lengths[sample]))
        if step == 4:
            low = int(lengths[sample]) - SEQ_LEN // 4
        places[sample, :count] = np.sort(rng.choice(np.arange(low, high), count, replace=False))
        real[sample, :count] = True
    return Batch(
        input_ids=np.where(mask, ids, 1),
        labels=np.where(targets, ids, IGNORED_LABEL),
        attention_mask=mask,
        segment_ids=None,
        global_positions=places,
        global_mask=real,
        sample_ids=np.arange(GLOBAL_BATCH),
        spans=((),) * GLOBAL_BATCH,
    )


def share(batch, data_rank, data_world):
    """The samples of one data-parallel rank: stream i goes to rank i % world."""
    mine = slice(data_rank, None, data_world)
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Batch(**{k: None if v is None else v[mine] for k, v in parts.items()})


def train(case):
    """(loss, gradient norm) of every step."""
    config = config_of(case)
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    init_distributed()
    topology = build_topology(Layout(case.data, case.context, case.tensor))
    torch.manual_seed(config.seed)
    model = LongformerForMaskedLM(config.model, VOCAB, topology.tensor_group)
    engine = build_engine(model, config, topology)
    history = []
    for step in range(STEPS):
        batch = global_batch(step)
        num_targets = int((batch.labels != IGNORED_LABEL).sum())
        set_learning_rate(engine, 1e-3 / (step + 1))
        total = torch.zeros((), dtype=torch.float64)
        mine = share(batch, topology.data_rank, case.data)
        for ids, labels, shard in micro_batches(mine, case.micro, topology):
            output = engine(ids, labels, shard, DropoutStep(config.seed, step))
            backward(engine, rank_loss(output.loss_sum, num_targets, topology))
            engine.step()
            total += output.loss_sum.detach().double()
        torch.distributed.all_reduce(total, group=topology.data_context_group)
        history.append((total.item() / num_targets, grad_norm(engine)))
    engine.destroy()
    destroy_topology(topology)
    return history


def walk(rank, world, cases):
    """{case name: history} of every case of this world size."""
    return {str(case): train(case) for case in cases}
