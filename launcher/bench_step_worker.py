"""One process of ``haloformer bench step``: a rank of ours, or transformers.

Each contender has its own processes, so that no one's memory or threads are left over from
another. ``bench_step_contender`` starts them and tells them when to step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haloformer.launcher.bench_step_cases import TINY, StepCase

_PARITY_LIMIT = 1e-4  # fp32, relative
_MASKED = 0.15
_FIRST_POSITION = 2  # of RoBERTa's table: rows 0 and 1 are of no token


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


def ours(case: StepCase, device: str) -> Step:
    """A rank of ``haloformer train``: its engine (DeepSpeed, ZeRO-1), its task, its dropout.

    It is on the device of its topology: a GPU wherever torch sees one.
    """
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
    assert topology.device.type == device, topology.device
    config = TrainConfig.model_validate(case.recipe(ranks))
    task = task_of(config)
    torch.manual_seed(0)
    engine = build_engine(task.build_model(config, case.vocab, topology), config, topology)
    batch = _our_batch(case)
    num_targets = int((batch.labels != -100).sum())
    places = _our_positions(case, topology)

    def step(number: int) -> float:
        dist.barrier()
        engine.train()
        set_learning_rate(engine, config.optim.learning_rate)
        loss = torch.zeros((), device=topology.device)
        for inputs in task.micro_batches(batch, 1, topology):
            output = engine(*inputs, DropoutStep(0, number), *places)
            backward(engine, rank_loss(output.loss_sum, num_targets, topology))
            engine.step()
            loss += output.loss_sum.detach()
        dist.all_reduce(loss)
        return loss.item() / num_targets

    return step


def _our_positions(case: StepCase, topology: Any) -> tuple[Tensor, ...]:
    """This rank's rows of a table that is used over and over; none where the model counts."""
    if case.position_rows is None:
        return ()
    rows = case.tokens // topology.layout.context
    first = topology.context_rank * rows
    places = torch.arange(first, first + rows, device=topology.device) % case.position_rows
    return (places[None] + _FIRST_POSITION,)


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


def theirs(case: StepCase, device: str) -> Step:
    """The model of transformers in the plainest loop, with torch's AdamW."""
    torch.manual_seed(0)
    model = _transformers_model(case).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    call = {name: x.to(device) for name, x in _transformers_call(case).items()}

    def step(number: int) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=case.precision == "bf16"):
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


class SentBytes:
    """Bytes of the halos that this rank has sent, counted where torch.distributed takes them."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.count = 0
        begin, isend = dist.batch_isend_irecv, dist.isend

        def counted(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
            sent = [x.tensor for x in p2p_op_list if x.op is isend]
            self.count += sum(x.numel() * x.element_size() for x in sent)
            return begin(p2p_op_list)

        dist.batch_isend_irecv = counted


class Scale:
    """Memory of this process in MiB: resident on a CPU, torch's own on a GPU."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"

    def now(self) -> float:
        """Held at the moment."""
        if self._gpu:
            return torch.cuda.memory_allocated() / 2**20
        return _status_mib("VmRSS")

    def restart(self) -> None:
        """Let the peak start from here."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Most that was held since."""
        if self._gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        return _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this kernel does not tell {field}")


def main() -> None:
    """Run one contender, or the parity check: a line of JSON when built, and one per step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("ours", "transformers", "parity"))
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # The libraries chat on stdout, which is for the answers; theirs go to stderr from here.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if arguments.role == "parity":
        print(json.dumps({"errors": parity()}), file=answers)
        return
    case = StepCase(**arguments.case)
    for found in _serve(ours if arguments.role == "ours" else theirs, case, arguments.device):
        print(json.dumps(found), file=answers)


def _serve(
    make: Callable[[StepCase, str], Step], case: StepCase, device: str
) -> Iterator[dict[str, Any]]:
    """What is known after building, then after each step that a line on stdin asks for."""
    # Libraries load and threads start on a small product, not in the first step.
    torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)
    if make is theirs:
        theirs(TINY[case.kind], device)(0)
    else:
        for name in ("engine", "tasks", "topology"):
            importlib.import_module(f"haloformer.launcher.{name}")
    scale, sent = Scale(device), SentBytes()
    before = scale.now()
    step = make(case, device)
    built = scale.now()
    scale.restart()
    yield {"built_mib": built - before}
    for number, _ in enumerate(sys.stdin):
        sent.count, start = 0, time.perf_counter()
        loss = step(number)
        seconds = time.perf_counter() - start
        peak = scale.peak()
        yield {
            "seconds": seconds,
            "loss": loss,
            "halo_bytes": sent.count,
            "peak_rss_mib": peak,
            "step_growth_mib": peak - built,  # beyond weights and engine
            "whole_growth_mib": peak - before,  # beyond the loaded libraries
        }


if __name__ == "__main__":
    main()
