"""Real training steps whose messages and memory are counted, for the planner to be held to.

``walk`` runs in the ranks of ``dist.run_ranks``: every case is one recipe, trained for two steps by
the engine and the task of ``haloformer train`` on random tokens. What is counted:

    messages   every call of torch.distributed, by group and operation, in bytes handed over
    memory     every allocation of torch's CPU allocator, from before the model is built
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.batch import Batch
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.launcher.engine import backward, build_engine, rank_loss, set_learning_rate
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.tasks import task_of
from haloformer.launcher.topology import Layout, build_topology, destroy_topology
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.led import shift_right

STEPS = 2
# Where each call has what this rank hands over: the whole of what is summed, scattered or gathered.
_CALLS = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather": (0, "tensor_list"),
}


class Messages:
    """Bytes handed to torch.distributed, by "group/operation"; see ``_CALLS``."""

    def __init__(self):
        self.bytes, self.names = Counter(), {}

    def start(self, topology):
        """Count from here; megatron makes one group of each kind, even of the same ranks."""
        self.bytes = Counter()
        self.names = {topology.data_context_group: "zero", topology.context_group: "context"}
        if topology.tensor_group is not None:
            self.names[topology.tensor_group] = "tensor"

    def count(self, group, operation, tensor):
        """Note a message of one of our groups; those of the world are for bookkeeping."""
        if group in self.names:
            parts = tensor if isinstance(tensor, list) else [tensor]
            size = sum(part.numel() * part.element_size() for part in parts)
            self.bytes[f"{self.names[group]}/{operation}"] += size

    @contextmanager
    def watching(self):
        """Count while this lasts; enter it before DeepSpeed is set up, which keeps references."""
        saved = {name: getattr(dist, name) for name in (*_CALLS, "batch_isend_irecv")}
        isend = dist.isend

        def wrap(name):
            place, keyword = _CALLS[name]

            def counted(*args, **kwargs):
                tensor = args[place] if place < len(args) else kwargs[keyword]
                groups = [a for a in args if isinstance(a, dist.ProcessGroup)]
                self.count(kwargs.get("group", groups[0] if groups else None), name, tensor)
                return _collective(saved[name], args, kwargs)

            return counted

        def point_to_point(operations):
            for operation in operations:
                if operation.op is isend:
                    self.count(operation.group, "send", operation.tensor)
            return saved["batch_isend_irecv"](operations)

        for name in _CALLS:
            setattr(dist, name, wrap(name))
        dist.batch_isend_irecv = point_to_point
        try:
            yield
        finally:
            for name, call in saved.items():
                setattr(dist, name, call)


def _collective(call, args, kwargs):
    """A collective after which gloo's thread has let go of its tensors, too.

    That thread may drop its references after the wait is over. If they are the last ones, memory
    is freed where the profiler, which sees one thread, does not see it, and counts as held.
    """
    holds = []
    for arg in (*args, *kwargs.values()):
        tensors = arg if isinstance(arg, list) else [arg]
        holds += [(x, x._use_count()) for x in tensors if torch.is_tensor(x)]
    work = call(*args, **kwargs)
    if work is not None:
        return _Work(work, holds)
    _wait_for_gloo(holds)
    return None


class _Work:
    """What an asynchronous collective returns; DeepSpeed does nothing with it but wait."""

    def __init__(self, work, holds):
        self._work, self._holds = work, holds

    def wait(self):
        """Wait as torch's own does, then for gloo's thread; this object holds nothing any more."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            _wait_for_gloo(self._holds)
            self._holds = []


def _wait_for_gloo(holds, timeout=60.0):
    deadline = time.monotonic() + timeout
    while any(tensor._use_count() > before for tensor, before in holds):
        assert time.monotonic() < deadline, "gloo never let go of a tensor"
        os.sched_yield()


def allocations(profile):
    """(time in ns, bytes) of all that torch's CPU allocator gave and took back, in order."""
    found, held = [], {}

    def visit(event):
        if event.tag.name == "Allocation":
            found.append(
                (event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr)
            )
        for child in event.children:
            visit(child)

    for root in profile.profiler.kineto_results.experimental_event_tree():
        visit(root)
    changes = []
    for moment, size, place in sorted(found):
        if size > 0:
            held[place] = size
        elif held.pop(place, None) is None:
            continue  # given before the profile began
        changes.append((moment, size))
    return changes


def batch_of(config, vocab, rng, data_rank, data_world):
    """One data-parallel rank's random batch; each rank's rows have the same number of targets."""
    count = config.batch.global_batch // data_world
    context = config.parallel.context
    length = -(-config.data.seq_len // context) * context
    ids = rng.integers(5, vocab, (count, length))
    has_global = int(config.data.global_tokens == "first")
    whole = {
        "input_ids": ids,
        "attention_mask": np.ones((count, length), bool),
        "global_positions": np.zeros((count, has_global), np.int64),
        "global_mask": np.ones((count, has_global), bool),
        "sample_ids": np.arange(count) * data_world + data_rank,
    }
    if config.model.kind == "led":
        width = -(-config.data.target_len // context) * context
        labels = rng.integers(5, vocab, (count, width))
        return PairBatch(
            **whole,
            labels=labels,
            decoder_input_ids=shift_right(torch.from_numpy(labels), 2, 1).numpy(),
            was_cut=np.zeros((count, 2), bool),
            keys=(None,) * count,
            pad_multiple=context,
        )
    chosen = np.ones((count, length), bool)
    if config.model.kind == "longformer_mlm":
        rows = length // context
        chosen = np.arange(length) % rows < round(config.data.mask_probability * rows)
        chosen = np.broadcast_to(chosen, ids.shape)
    labels = np.where(chosen, ids, -100)
    return Batch(**whole, labels=labels, segment_ids=None, spans=((),) * count)


def train(raw, vocab, messages, weigh):
    """Two steps of one recipe: the bytes of the second, and its peak of memory where asked for."""
    config = TrainConfig.model_validate(raw)
    parallel = config.parallel
    data = dist.get_world_size() // (parallel.context * parallel.tensor)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    profile = nullcontext()
    if weigh:
        activities = [torch.profiler.ProfilerActivity.CPU]
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with profile:
        init_distributed()
        topology = build_topology(Layout(data, parallel.context, parallel.tensor))
        task = task_of(config)
        torch.manual_seed(0)
        engine = build_engine(task.build_model(config, vocab, topology), config, topology)
        gc.collect()  # DeepSpeed leaves cycles behind that hold the first copy of the weights
        rng = np.random.default_rng(topology.data_rank)
        for number in range(STEPS):
            batch = batch_of(config, vocab, rng, topology.data_rank, data)
            targets = int((batch.labels != -100).sum()) * data
            messages.start(topology)
            gc.collect()  # what a step leaves behind is gone sooner or later
            set_learning_rate(engine, 1e-4)
            engine.train()
            with torch.profiler.record_function(f"step {number}"):
                for inputs in task.micro_batches(batch, config.batch.micro_batch, topology):
                    local_sum = engine(*inputs, DropoutStep(0, number)).loss_sum
                    backward(engine, rank_loss(local_sum, targets, topology))
                    engine.step()
        seen = dict(messages.bytes)
        del local_sum, inputs
    engine.destroy()
    destroy_topology(topology)
    gc.collect()
    return {"bytes": seen, "peak": _peak(profile) if weigh else None}


def _peak(profile):
    """Bytes held before the second step, and the most that was held in it."""
    events = profile.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == f"step {STEPS - 1}")
    end = next(e.end_ns() for e in events if e.name() == f"step {STEPS - 1}")
    held = before = most = 0
    for moment, size in allocations(profile):
        held += size
        if moment < start:
            before = most = held
        elif moment <= end:
            most = max(most, held)
    return {"before": before, "most": most}


def walk(rank, world, cases):
    """What was counted of every (recipe, vocabulary, whether to weigh it)."""
    messages = Messages()
    with messages.watching():
        return [train(raw, vocab, messages, weigh) for raw, vocab, weigh in cases]
