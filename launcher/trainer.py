"""The training loop of one rank."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.engine import (
    Engine,
    backward,
    grad_norm,
    rank_loss,
    set_learning_rate,
)
from haloformer.launcher.exchange import gather_json
from haloformer.launcher.phases import OpenPhase, enter_phase, open_phase
from haloformer.launcher.progress import StepProgress
from haloformer.launcher.pulse import Pulse
from haloformer.launcher.run_dir import RunDir
from haloformer.launcher.schedule import learning_rate
from haloformer.launcher.tasks import AnyBatch, HeldOutSource, Task
from haloformer.launcher.throughput import peak_memory_bytes
from haloformer.launcher.topology import Topology
from haloformer.launcher.tracker import Tracker
from haloformer.model.dropout_sites import DropoutStep


@dataclass
class StopRequest:
    """Set by the SIGTERM handler and by orders; the ranks agree on it at the next step."""

    asked: bool = False

    def ask(self) -> None:
        """Stop after this step, with a checkpoint."""
        self.asked = True


class Agreed(NamedTuple):
    """What all ranks know of a global batch before they compute on it."""

    num_targets: int
    num_tokens: int
    flops: int
    stop_asked: bool
    counts: dict[str, float]  # of the task


@dataclass
class Trainer:
    """One rank of a run.

    ``opened`` is the phase of the first step; the next ones are opened as they come. Rank 0 also
    keeps the records: ``tracker`` and ``progress`` are None elsewhere.
    """

    config: TrainConfig
    topology: Topology
    engine: Engine
    task: Task
    opened: OpenPhase
    store: CheckpointStore
    run_dir: RunDir
    tracker: Tracker | None
    progress: StepProgress | None
    stop: StopRequest
    pulse: Pulse
    peak_flops: float
    _skipped_before: int = field(default=0, init=False)

    def run(self, first_step: int) -> str:
        """Train from ``first_step`` to the end, or until asked to stop.

        Returns:
            "finished", or "stopped" after a SIGTERM, with a checkpoint written either way.
        """
        config, saved = self.config, first_step
        self._begin_phase()
        if first_step == 0:
            self._evaluate(0)
        for step in range(first_step, config.steps):
            if step == self.opened.phase.end_step:
                self._next_phase(step)
            stopping = self._train_step(step)
            done = step + 1
            self.pulse.at_step(done)
            phase_ends = done == self.opened.phase.end_step
            if phase_ends or (config.eval.every is not None and done % config.eval.every == 0):
                self._evaluate(done)
            if phase_ends and self.tracker is not None:
                self.tracker.end_phase(self.opened.phase)
            last = done == config.steps
            ends = last or stopping
            if ends or done % config.checkpoint.every == 0:
                self._save(done, ends)
                saved = done
            self._report_checkpoints()
            if stopping and not last:
                return self._end("stopped", saved)
        return self._end("finished", config.steps)

    def close(self) -> None:
        """Let go of the streams of the phase that is open."""
        self.opened.close()

    def _next_phase(self, step: int) -> None:
        self._skipped_before += self.opened.train.num_skipped
        self.opened.close()
        self.opened = open_phase(self.task, self.config.phase_at(step), self.topology)
        enter_phase(self.engine, self.opened.phase, self.topology)
        self._begin_phase()

    def _begin_phase(self) -> None:
        """Say which phase this is, in a run that has several."""
        if not self.config.phases or self.tracker is None or self.progress is None:
            return
        phase = self.opened.phase
        self.tracker.begin_phase(phase)
        self.progress.say(
            f"phase {phase.number} ({phase.name}): steps {phase.first_step + 1} to "
            f"{phase.end_step}, {phase.config.batch.global_batch} x "
            f"{phase.config.data.seq_len} tokens, window {phase.config.model.attention_window}"
        )

    def _train_step(self, step: int) -> bool:
        """One optimizer step on one global batch; True when some rank was asked to stop."""
        start = time.perf_counter()
        phase, train, engine = self.opened.phase, self.opened.train, self.engine
        config = phase.config
        batch = train.next_batch()
        waited = time.perf_counter() - start
        agreed = self._agree_before(batch)
        num_targets = agreed.num_targets
        rate = learning_rate(step - phase.first_step, config.steps, config.optim)
        set_learning_rate(engine, rate)
        engine.train()
        dropout = DropoutStep(config.seed, step)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for inputs in self.task.micro_batches(batch, config.batch.micro_batch, self.topology):
            local_sum = engine(*inputs, dropout).loss_sum  # without the logits, which are large
            backward(engine, rank_loss(local_sum, num_targets, self.topology))
            engine.step()
            loss_sum += local_sum.detach()
        dist.all_reduce(loss_sum, group=self.topology.data_context_group)
        loss = loss_sum.item() / max(num_targets, 1)
        values = {
            "loss": loss,
            **self.task.rates(loss, train.facts.characters_per_token),
            "grad_norm": grad_norm(engine),
            "learning_rate": rate,
            **self._rates(agreed, time.perf_counter() - start),
            "data_seconds": waited,  # of rank 0, for its batch; about 0 when prefetch keeps up
            **agreed.counts,
        }
        if self.config.phases:
            values |= {"phase": float(phase.number), "seq_len": float(config.data.seq_len)}
        self._record(step + 1, values)
        # DeepSpeed passes over a step whose gradient is not finite, without a word.
        norm = values["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.store.wait()  # what is on its way is from before, and all there will be
            raise ValueError(
                f"step {step + 1}: the loss is {loss} and the gradient norm {norm}; the newest "
                "checkpoint is from before it: resume with a lower optim.learning_rate"
            )
        return agreed.stop_asked

    def _agree_before(self, batch: AnyBatch) -> Agreed:
        """Count the global batch, and ask whether any rank was asked to stop: one small sum."""
        counts = dict(self.task.counts(batch))
        if self.config.data.on_corrupt == "skip":
            # Since this process started.
            counts["num_skipped"] = self._skipped_before + self.opened.train.num_skipped
        phase = self.opened.phase
        flops = int(self.task.flops(phase.config, self.opened.train.facts.vocab_size, batch))
        mine = [self.task.num_targets(batch), batch.num_tokens, flops, *counts.values()]
        # Every context and tensor rank sees the same batch, so only the first one counts.
        mine = mine if self._counts else [0] * len(mine)
        agreed = torch.tensor([int(self.stop.asked), *mine], device=self.topology.device)
        dist.all_reduce(agreed)  # tensor ranks too, or one would stop a step before another
        stop_asked, num_targets, num_tokens, flops, *counted = agreed.tolist()
        named = dict(zip(counts, map(float, counted), strict=True))
        return Agreed(num_targets, num_tokens, flops, stop_asked > 0, named)

    def _rates(self, agreed: Agreed, seconds: float) -> dict[str, float]:
        """Tokens per second, and the share of the peak (MFU) where that is known."""
        rates = {"tokens_per_second": agreed.num_tokens / seconds, "step_seconds": seconds}
        if self.peak_flops > 0.0:
            rates["mfu_estimate"] = agreed.flops / seconds / self.peak_flops
        return rates

    @property
    def _counts(self) -> bool:
        return self.topology.context_rank == 0 and self.topology.tensor_rank == 0

    def _evaluate(self, step: int) -> None:
        """Held-out loss over the first ``eval.batches`` global batches, without dropout."""
        held_out, config = self.opened.held_out, self.opened.phase.config
        loss, _ = evaluate(self.engine, self.task, held_out, config, self.topology)
        if self.tracker is not None and self.progress is not None:
            rates = self.task.rates(loss, held_out.index.characters_per_token)
            values = {"eval_loss": loss, **{f"eval_{key}": v for key, v in rates.items()}}
            self.tracker.log(step, values)
            self.run_dir.append_metrics({"step": step, **values})
            bits = f", {rates['bits_per_char']:.4f} bits/char" if "bits_per_char" in rates else ""
            self.progress.say(f"step {step}: held-out loss {loss:.4f}{bits}")

    def _record(self, step: int, values: dict[str, float]) -> None:
        if self.tracker is None or self.progress is None:
            return
        self.run_dir.append_metrics({"step": step, **values})
        self.progress.step(step, values)
        if step % self.config.tracking.log_every == 0:
            peak = peak_memory_bytes(self.topology.device)
            self.tracker.log(step, {**values, "peak_memory_mib": peak / 2**20})

    def _save(self, step: int, ends: bool) -> None:
        state = self._state()
        if ends:
            patience = self.config.checkpoint.patience
            self.store.save_and_wait(self.engine, step, state, patience)
        else:
            self.store.save(self.engine, step, state)

    def _report_checkpoints(self) -> None:
        for outcome in self.store.poll():
            if self.tracker is None or self.progress is None:
                continue
            if outcome.error is not None:
                self.progress.say(f"warning: {outcome.error}; training goes on")
                continue
            self.progress.say(
                f"step {outcome.step}: checkpoint committed ({outcome.seconds:.1f} s, of which "
                f"training waited {outcome.waited:.2f} s)"
            )
            seconds = {"checkpoint_seconds": outcome.seconds, "checkpoint_wait": outcome.waited}
            self.tracker.log(outcome.step, seconds)

    def _state(self) -> dict[str, Any]:
        """All that a run needs to go on besides weights and moments: seed and data cursors."""
        mine = self.opened.train.state_dict() if self._counts else {}
        cursors: dict[str, Any] = {}
        for part in gather_json(mine, self.topology.data_context_group, self.topology.device):
            cursors.update(part)
        return self.opened.state(cursors)

    def _end(self, state: str, step: int) -> str:
        if self.tracker is not None:
            assert state in ("finished", "stopped")
            self.run_dir.write_state("finished" if state == "finished" else "stopped", step)
            self.tracker.close("FINISHED" if state == "finished" else "KILLED")
        return state


def evaluate(
    engine: Engine, task: Task, stream: HeldOutSource, config: TrainConfig, topology: Topology
) -> tuple[float, int]:
    """Mean held-out loss in nats per target token, the same on every rank.

    Returns:
        Loss, and the number of targets it is a mean of.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=topology.device)
    engine.eval()
    with torch.no_grad():
        for batch in stream:
            for inputs in task.micro_batches(batch, config.batch.micro_batch, topology):
                output = engine(*inputs, None)
                totals[0] += output.loss_sum
            # Every context rank sees the same batch, so only the first one counts.
            totals[1] += task.num_targets(batch) * int(topology.context_rank == 0)
    dist.all_reduce(totals, group=topology.data_context_group)
    loss_sum, num_targets = totals.tolist()
    return loss_sum / max(num_targets, 1.0), int(num_targets)
