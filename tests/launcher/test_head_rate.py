"""A new head on a trained encoder may learn at a rate of its own."""

import pytest

from dist import run_ranks
from haloformer.configs.load import ConfigError, load_config
from head_rate_ranks import ENCODER_RATE, HEAD_RATE, changes


def test_a_head_moves_at_its_own_rate_and_the_encoder_at_the_recipes():
    (moved,) = run_ranks(1, changes)
    rates = {name: ENCODER_RATE if name.startswith("encoder.") else HEAD_RATE for name in moved}
    assert set(rates.values()) == {ENCODER_RATE, HEAD_RATE}
    assert moved == pytest.approx(rates, rel=1e-3)


def test_a_model_without_a_head_of_its_own_has_no_head_rate():
    with pytest.raises(ConfigError, match=r"head_learning_rate is for a head .* longformer_mlm"):
        load_config("enwiki_mlm", ["optim.head_learning_rate=1e-4"])
