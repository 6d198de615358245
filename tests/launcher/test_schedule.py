"""The learning rate is a pure function of the step."""

import itertools

import pytest

from haloformer.configs.schema import OptimConfig
from haloformer.launcher.schedule import learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(step, 10, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_decay_ends_at_the_end_rate() -> None:
    config = OptimConfig(learning_rate=1.0, end_learning_rate=0.2, warmup_steps=2)
    rates = [learning_rate(step, 10, config) for step in range(2, 11)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.2)
    steps = [a - b for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([0.1] * 8)


def test_polynomial_decay_is_the_power_of_what_remains() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, schedule="polynomial", power=3.0)
    assert learning_rate(5, 10, config) == pytest.approx(0.125)


def test_a_run_of_warm_up_only_does_not_divide_by_zero() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=3)
    assert learning_rate(3, 3, config) == 0.0
