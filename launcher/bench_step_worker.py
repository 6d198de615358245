"""One process of ``haloformer bench step``: a rank of ours, or transformers.

Each contender has its own processes, so that no one's memory or threads are left over from
another. It prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haloformer.launcher.bench_step_cases import TINY, StepCase

_PARITY_LIMIT = 1e-4  # fp32, relative
_MASKED = 0.15


@dataclass(frozen=True)
class Tokens:
    """One random batch: ids [1, N] with <s> first, labels [1, N] or [1, T]."""

    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, case: StepCase) -> Tokens:
        """The batch of a case, the same in every process."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(4, case.vocab, (1, case.tokens), generator=draw)
        ids[0, 0] = 0
        if case.kind == "led":
            return cls(ids, torch.randint(4, case.vocab, (1, case.targets), generator=draw))
        masked = torch.rand(1, case.tokens, generator=draw) < _MASKED
        masked[0, 1] = True
        return cls(ids, ids.where(masked, -100))


Step = Callable[[int], float]


def ours(case: StepCase) -> Step:
    """A rank of ``haloformer train``: its engine (DeepSpeed, ZeRO-1), its task, its dropout."""
    import torch.distributed as dist

    from haloformer.configs.schema import TrainConfig
    from haloformer.launcher.engine import backward, build_engine, rank_loss, set_learning_rate
    from haloformer.launcher.runtime import init_distributed
    from haloformer.launcher.tasks import task_of
    from haloformer.launcher.topology import Layout, build_topology
    from haloformer.model.dropout_sites import DropoutStep

    init_distributed()
    ranks = dist.get_world_size()
    topology = build_topology(Layout(data=1, context=ranks))
    config = TrainConfig.model_validate(case.recipe(ranks))
    task = task_of(config)
    torch.manual_seed(0)
    engine = build_engine(task.build_model(config, case.vocab, topology), config, topology)
    batch = _our_batch(case)
    num_targets = int((batch.labels != -100).sum())

    def step(number: int) -> float:
        dist.barrier()
        engine.train()
        set_learning_rate(engine, config.optim.learning_rate)
        loss = torch.zeros(())
        for inputs in task.micro_batches(batch, 1, topology):
            output = engine(*inputs, DropoutStep(0, number))
            backward(engine, rank_loss(output.loss_sum, num_targets, topology))
            engine.step()
            loss += output.loss_sum.detach()
        dist.all_reduce(loss)
        return loss.item() / num_targets

    return step


def _our_batch(case: StepCase) -> Any:
    from haloformer.data_pipeline.batch import Batch
    from haloformer.data_pipeline.pairs import PairBatch
    from haloformer.model.led import shift_right

    tokens = Tokens.of(case)
    first = np.zeros((1, 1), np.int64)
    whole = {
        "input_ids": tokens.ids.numpy(),
        "labels": tokens.labels.numpy(),
        "attention_mask": np.ones((1, case.tokens), np.bool_),
        "global_positions": first,
        "global_mask": np.ones((1, 1), np.bool_),
        "sample_ids": np.zeros(1, np.int64),
    }
    if case.kind == "mlm":
        return Batch(**whole, segment_ids=None, spans=((),))
    return PairBatch(
        **whole,
        decoder_input_ids=shift_right(tokens.labels, 2, 1).numpy(),
        was_cut=np.zeros((1, 2), np.bool_),
        keys=(None,),
        pad_multiple=int(os.environ["WORLD_SIZE"]),
    )


def theirs(case: StepCase) -> Step:
    """The model of transformers in the plainest loop, with torch's AdamW."""
    torch.manual_seed(0)
    model = _transformers_model(case).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    call = _transformers_call(case)

    def step(number: int) -> float:
        loss = model(**call).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def _transformers_model(case: StepCase, **changed: float) -> Any:
    import transformers

    config = case.transformers_config() | changed
    if case.kind == "mlm":
        return transformers.LongformerForMaskedLM(transformers.LongformerConfig(**config))
    return transformers.LEDForConditionalGeneration(transformers.LEDConfig(**config))


def _transformers_call(case: StepCase) -> dict[str, Tensor]:
    tokens = Tokens.of(case)
    chosen = torch.zeros_like(tokens.ids)
    chosen[0, 0] = 1
    mask = torch.ones_like(tokens.ids)
    call = {"input_ids": tokens.ids, "attention_mask": mask, "labels": tokens.labels}
    return call | {"global_attention_mask": chosen}


def parity() -> dict[str, float]:
    """Loss and gradients of both sides on the same small weights: relative errors by kind.

    Raises:
        RuntimeError: If one is above the limit: then nothing is to be timed.
    """
    from haloformer.model.convert import load_pretrained, parameter_names

    off = {"mlm": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "led": ("dropout",)}
    errors: dict[str, float] = {}
    for kind, case in TINY.items():
        torch.manual_seed(0)
        peer = _transformers_model(case, **dict.fromkeys(off[kind], 0.0)).train()
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            mine: Any = load_pretrained(folder).train()
        call = _transformers_call(case)
        losses = [model(**call).loss for model in (mine, peer)]
        for loss in losses:
            loss.backward()
        names, reference = parameter_names(mine), dict(peer.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in reference.values() if p.grad is not None)
        gaps = [abs(float(losses[0] - losses[1])) / float(losses[1])]
        for name, parameter in mine.named_parameters():
            wanted = reference[names[name]].grad
            if wanted is not None:
                gaps.append(float((parameter.grad - wanted).abs().max()) / largest)
        errors[kind] = max(gaps)
        if not errors[kind] <= _PARITY_LIMIT:  # NaN too
            raise RuntimeError(f"{kind}: error {errors[kind]:.1e} is above {_PARITY_LIMIT:g}")
    return errors


def main() -> None:
    """Run one contender, or the parity check, and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("ours", "transformers", "parity"))
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # The libraries chat on stdout, which is for the one line.
    with contextlib.redirect_stdout(sys.stderr):
        found: dict[str, Any]
        if arguments.role == "parity":
            found = {"errors": parity()}
        else:
            case = StepCase(**arguments.case)
            found = _measure(ours if arguments.role == "ours" else theirs, case, arguments.steps)
    print(json.dumps(found), flush=True)


def _measure(make: Callable[[StepCase], Step], case: StepCase, steps: int) -> dict[str, Any]:
    # Libraries load and threads start on a small product, not in the first step.
    torch.ones(512, 512) @ torch.ones(512, 512)
    if make is theirs:
        theirs(TINY[case.kind])(0)
    else:
        for name in ("engine", "tasks", "topology"):
            importlib.import_module(f"haloformer.launcher.{name}")
    before = _status_mib("VmRSS")
    step = make(case)
    built = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    seconds, losses = [], []
    for number in range(steps):
        start = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - start)
    peak = _status_mib("VmHWM")
    return {
        "seconds": seconds,
        "losses": losses,
        "peak_rss_mib": peak,
        "step_growth_mib": peak - built,  # beyond weights and engine
        "whole_growth_mib": peak - before,  # beyond the loaded libraries
    }


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this kernel does not tell {field}")


if __name__ == "__main__":
    main()
