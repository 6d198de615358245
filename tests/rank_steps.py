"""One rank of a training on any layout, put together from the trainer's own parts."""

import os

import torch
import torch.distributed

from haloformer.configs.schema import TrainConfig
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


class Rank:
    """A rank that is ready for its first step.

    Args:
        config: The recipe; its data are read, and its ``init_from`` if it has one.
        data: Size of the data axis; the others are the recipe's.
        first: The step to begin with, of whose phase data and model are.

    Attributes:
        said: Of what the model started from, None if it is random.
    """

    def __init__(self, config: TrainConfig, data: int, first: int = 0) -> None:
        self.config, parallel = config, config.parallel
        os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # the runner would set it
        init_distributed()
        self.topology = build_topology(Layout(data, parallel.context, parallel.tensor))
        self.task, phase = task_of(config), config.phase_at(first)
        self.opened = open_phase(self.task, phase, self.topology)
        torch.manual_seed(config.seed)
        facts = self.opened.train.facts
        sizes = (facts.vocab_size, self.topology, len(facts.labels))
        model = self.task.build_model(phase.config, *sizes)
        start = config.init_from
        self.said = None if start is None else load_start(model, config, self.topology)
        self.engine = build_engine(model, phase.config, self.topology)

    def train_step(self, step: int, rate: float) -> tuple[float, float, int]:
        """Loss per target and number of tokens of the global batch, and the gradient norm."""
        topology, engine, config = self.topology, self.engine, self.opened.phase.config
        batch = self.opened.train.next_batch()
        counted = torch.tensor([self.task.num_targets(batch), batch.num_tokens])
        torch.distributed.all_reduce(counted, group=topology.data_group)
        num_targets, num_tokens = counted.tolist()
        set_learning_rate(engine, rate)
        engine.train()
        total = torch.zeros((), dtype=torch.float64)
        for inputs in self.task.micro_batches(batch, config.batch.micro_batch, topology):
            output = engine(*inputs, DropoutStep(self.config.seed, step))
            backward(engine, rank_loss(output.loss_sum, num_targets, topology))
            engine.step()
            total += output.loss_sum.detach().double()
        torch.distributed.all_reduce(total, group=topology.data_context_group)
        return total.item() / num_targets, grad_norm(engine), num_tokens

    def evaluate(self) -> tuple[float, int]:
        """Held-out loss of the phase, and over how many targets."""
        config = self.opened.phase.config
        return evaluate(self.engine, self.task, self.opened.held_out, config, self.topology)

    def close(self) -> None:
        """End data, engine and groups, for another training in the same process."""
        self.opened.close()
        self.engine.destroy()
        destroy_topology(self.topology)
