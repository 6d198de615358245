"""A tiny model that is trained on every layout: shared by the tests of engine and checkpoints.

    tokens of one sequence, 2 context ranks:   0 1 2 3 | 4 5 6 7
    each row sees the mean of the whole sequence, so gradients cross the border

``walk`` runs in the ranks of ``dist.run_ranks``; everything a test looks at comes back by name.
"""

import contextlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from safetensors import safe_open
from torch import nn

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.engine import (
    accumulation_steps,
    backward,
    build_engine,
    grad_norm,
    rank_loss,
    set_learning_rate,
)
from haloformer.launcher.fragments import load_fragments, take_snapshot
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.topology import Layout, build_topology, destroy_topology
from haloformer.model.layers import (
    column_linear,
    row_linear,
    vocab_bias,
    vocab_embedding,
    vocab_logits,
)
from haloformer.model.vocab_loss import token_loss
from places import describe

VOCAB, WIDTH, SEQ_LEN, GLOBAL_BATCH = 37, 12, 8, 4
SAVED_AT, STEPS = 2, 4


@dataclass(frozen=True)
class Case:
    """One way to spread the same global batch."""

    data: int
    context: int
    stage: int
    micro: int = 1
    precision: str = "fp32"
    tensor: int = 1

    def __str__(self):
        mesh = f"dp{self.data}_cp{self.context}_tp{self.tensor}"
        return f"{mesh}_zero{self.stage}_mb{self.micro}_{self.precision}"

    @property
    def world(self):
        return self.data * self.context * self.tensor


MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]
# Accumulation is 4 at data 1 and 2 at data 2, and 1 where the micro-batch is 2.
FP32 = [Case(d, c, s) for d, c in MESHES for s in range(4)] + [Case(2, 2, s, 2) for s in range(4)]
TENSOR = [Case(1, 2, 0, tensor=2), Case(1, 2, 1, tensor=2), Case(1, 2, 3, tensor=2)]
TENSOR += [Case(1, 1, 2, tensor=2), Case(1, 1, 3, tensor=4)]
FP32 += TENSOR
BF16 = [Case(d, c, s, 1, "bf16") for d, c in [(2, 1), (2, 2)] for s in (1, 2, 3)]
BF16 += [Case(1, 2, 3, 1, "bf16", tensor=2)]
ELASTIC = [  # written by -> read by
    (Case(2, 2, 3), Case(2, 1, 1)),
    (Case(2, 2, 3), Case(1, 1, 3)),
    (Case(2, 2, 1), Case(1, 2, 3)),
    (Case(2, 2, 0), Case(1, 2, 2)),
    (Case(2, 2, 2), Case(1, 1, 0)),
    (Case(2, 1, 3), Case(1, 1, 1)),
    (Case(2, 2, 3, 1, "bf16"), Case(2, 1, 1, 1, "bf16")),
    (Case(1, 2, 1, tensor=2), Case(1, 1, 3)),
    (Case(1, 2, 3, tensor=2), Case(1, 2, 1)),
    (Case(2, 2, 3), Case(1, 1, 2, tensor=2)),
    (Case(1, 1, 3, tensor=4), Case(1, 1, 1, tensor=2)),
    (Case(1, 2, 0, tensor=2), Case(1, 1, 3, tensor=4)),
    (Case(1, 2, 3, 1, "bf16", tensor=2), Case(2, 1, 3, 1, "bf16")),
]


class SumOverRanks(torch.autograd.Function):
    """Sum over a group; the gradient of every rank's copy comes back summed as well."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class TinyModel(nn.Module):
    """Embedding, mixing over the whole sequence, MLP, norm, tied head; summed cross entropy."""

    def __init__(self, group, tensor_group=None):
        super().__init__()
        self.group, self.tensor_group = group, tensor_group
        self.embedding = vocab_embedding(VOCAB, WIDTH, 1.0, tensor_group)
        self.inner = column_linear(WIDTH, 3 * WIDTH, 0.3, tensor_group)
        self.outer = row_linear(3 * WIDTH, WIDTH, 0.2, tensor_group)
        self.norm = nn.LayerNorm(WIDTH)
        self.head_bias = vocab_bias(VOCAB, tensor_group)

    def forward(self, ids, labels):
        x = self.embedding(ids)  # [B, rows, E]
        total = x.float().sum(1, keepdim=True)
        if self.group is not None:
            total = SumOverRanks.apply(total, self.group)
        x = x + total.to(x) / SEQ_LEN
        x = self.norm(x + self.outer(nn.functional.gelu(self.inner(x))))
        chosen = labels != -100
        logits = vocab_logits(x[chosen], self.embedding.weight, self.head_bias, self.tensor_group)
        return token_loss(logits, labels[chosen], VOCAB, self.tensor_group).sum()


def tiny_config(case):
    """A recipe of the case; only batch, optim, parallel and sizes are read by the engine."""
    return TrainConfig.model_validate(
        {
            "name": "tiny",
            "steps": STEPS,
            "model": {
                "hidden_size": WIDTH,
                "num_layers": 1,
                "num_heads": 1,
                "ffn_size": WIDTH,
                "max_positions": SEQ_LEN,
                "attention_window": 2,
            },
            "data": {"train": "unused", "eval": "unused", "seq_len": SEQ_LEN},
            "batch": {"global_batch": GLOBAL_BATCH, "micro_batch": case.micro},
            "optim": {"learning_rate": 1e-2, "clip_norm": 0.5, "weight_decay": 0.1},
            "parallel": {
                "context": case.context,
                "tensor": case.tensor,
                "zero_stage": case.stage,
                "precision": case.precision,
            },
            "checkpoint": {"every": 1},
        }
    )


def global_batch(step):
    """ids, labels int64 [GLOBAL_BATCH, SEQ_LEN]; uneven: sample 0 has no target in its 2nd half."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    labels = torch.randint(VOCAB, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
    labels[0, SEQ_LEN // 2 :] = -100
    return ids, labels


def tiny_model(group, tensor_group=None):
    """The same weights every time."""
    torch.manual_seed(5)
    return TinyModel(group, tensor_group)


def start(case):
    """Topology and engine of a case."""
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # the runner would set it
    init_distributed()
    topology = build_topology(Layout(case.data, case.context, case.tensor))
    model = tiny_model(topology.context_group, topology.tensor_group)
    return topology, build_engine(model, tiny_config(case), topology)


def stop(topology, engine):
    engine.destroy()
    destroy_topology(topology)


def train(engine, topology, config, first, last, evaluating=False):
    """Steps [first, last): (loss of the global batch, gradient norm) of each.

    Evaluating before each step must change nothing, ZeRO-3's record of the modules included.
    """
    layout, micro = topology.layout, config.batch.micro_batch
    rows = SEQ_LEN // layout.context
    mine = slice(topology.context_rank * rows, (topology.context_rank + 1) * rows)
    history = []
    for step in range(first, last):
        set_learning_rate(engine, 1e-2 / (step + 1))
        ids, labels = global_batch(step)
        if evaluating:
            engine.eval()
            with torch.no_grad():
                engine(ids[:1, mine], labels[:1, mine])
            engine.train()
        num_tokens = int((labels != -100).sum())
        total = torch.zeros((), dtype=torch.float64)
        for index in range(accumulation_steps(config, layout.data)):
            offset = (index * layout.data + topology.data_rank) * micro
            samples = slice(offset, offset + micro)
            local_sum = engine(ids[samples, mine], labels[samples, mine])
            backward(engine, rank_loss(local_sum, num_tokens, topology))
            engine.step()
            total += local_sum.detach().double()
        torch.distributed.all_reduce(total, group=topology.data_context_group)
        history.append((total.item() / num_tokens, grad_norm(engine)))
    return history


def walk(rank, world, cases, elastic, folder):
    """Train every case of this world size, and go on from what it and others saved.

    Returns:
        {"trained" | "resumed": {case name: history}, "elastic": {(writer, reader): history}}, what
        ``places.describe`` says in a world of 4, what DeepSpeed printed, and {case name: the
        weights, bit for bit, that every rank has a copy of}.
    """
    warnings.simplefilter("error")  # init_distributed filters what DeepSpeed cannot help
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{folder}/compiled"
    places = describe(rank) if world == 4 else None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        seen, copies = walk_cases(cases, elastic, folder)
    return seen, places, said.getvalue(), copies


def walk_cases(cases, elastic, folder):
    seen, copies = {"trained": {}, "resumed": {}, "elastic": {}}, {}
    for case in cases:
        config, place = tiny_config(case), Path(folder, str(case))
        topology, engine = start(case)
        seen["trained"][str(case)] = train(engine, topology, config, 0, SAVED_AT)
        save(engine, topology, place)
        seen["trained"][str(case)] += train(engine, topology, config, SAVED_AT, STEPS)
        save(engine, topology, place / "end")
        if case.stage < 3:  # weights are whole between steps
            norm, outer = engine.module.norm, engine.module.outer
            copies[str(case)] = [p.tolist() for p in (norm.weight, norm.bias, outer.bias)]
        stop(topology, engine)
        if case.micro == 1:
            seen["resumed"][str(case)] = go_on(case, place, place / "resumed")
    for writer, reader in elastic:
        seen["elastic"][str(writer), str(reader)] = go_on(reader, Path(folder, str(writer)), None)
    return seen, copies


def save(engine, topology, folder):
    take_snapshot(engine, topology).write(folder, topology.control_group)


def go_on(case, source, target):
    """Load at SAVED_AT, train to the end, and save there; the steps' history."""
    topology, engine = start(case)
    load_fragments(engine, topology, source, SAVED_AT)
    history = train(engine, topology, tiny_config(case), SAVED_AT, STEPS, evaluating=True)
    if target is not None:
        save(engine, topology, target)
    stop(topology, engine)
    return history


def saved_tensors(folder):
    """Every flat tensor of a checkpoint, whole, read slice by slice without DCP."""
    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stored:
            offsets = json.loads(stored.metadata()["DCP_SHARDING_INFO"])
            for key in stored.keys():  # noqa: SIM118
                slot = parts.setdefault(key, {})
                offset = offsets[key]["saved_offsets"][0]
                assert offset not in slot, f"{key} {offset} is saved twice"
                slot[offset] = stored.get_tensor(key)
    whole = {key: torch.cat([slot[s] for s in sorted(slot)]) for key, slot in parts.items()}
    blocks = {}  # "outer.weight[:,12:24]" is a block of columns
    for key in [key for key in whole if key.endswith("]")]:
        name, columns = key.removesuffix("]").split("[:,")
        start, stop = map(int, columns.split(":"))
        blocks.setdefault(name, {})[start] = whole.pop(key).view(-1, stop - start)
    for name, block in blocks.items():
        whole[name] = torch.cat([block[s] for s in sorted(block)], dim=1).flatten()
    return whole
