"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from haloformer.configs.schema import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of one optimizer step.

    Linear warm-up to ``learning_rate`` over ``warmup_steps``, then constant, or a decay to
    ``end_learning_rate`` at the last step: linear, or polynomial ``remaining ** power`` (the
    Longformer paper's continued pretraining uses power 3, section 5).

    Args:
        step: Index of the step, from 0, within the phase.
        total_steps: Steps of the phase; without phases, of the whole run.
        config: Peak, end, shape.
    """
    peak, end = config.learning_rate, config.end_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    remaining = (total_steps - step) / max(total_steps - config.warmup_steps, 1)
    power = 1.0 if config.schedule == "linear" else config.power
    return end + (peak - end) * math.pow(max(remaining, 0.0), power)
