"""FLOPs and parameters from a recipe's numbers agree with the model that is built from it."""

import torch

from haloformer.configs.load import load_config
from haloformer.configs.sizes import num_parameters
from haloformer.launcher.throughput import (
    forward_flops_per_token,
    peak_flops,
    peak_memory_bytes,
    training_flops_per_token,
)
from haloformer.model.longformer import LongformerForMaskedLM

MODEL = load_config("enwiki_mlm", ["model.max_positions=64"]).model


def test_the_parameter_count_is_that_of_the_model() -> None:
    model = LongformerForMaskedLM(MODEL, 261)
    assert num_parameters(MODEL, 261) == sum(p.numel() for p in model.parameters())


def test_flops_are_the_textbook_terms() -> None:
    size, window = MODEL.hidden_size, 256
    layer = 2 * (4 * size * size + 2 * size * MODEL.ffn_size) + 4 * size * (window + 1)
    flops = forward_flops_per_token(MODEL, 261, num_globals=0, target_fraction=0.0)
    assert flops == MODEL.num_layers * layer
    head = forward_flops_per_token(MODEL, 261, num_globals=0, target_fraction=1.0) - flops
    assert head == 2 * size * (size + 261)
    one, many = (
        forward_flops_per_token(MODEL, 261, num_globals=count, target_fraction=0.0) - flops
        for count in (1, size)
    )
    # A global column, and the global rows: folded, or with two projections of the sequence.
    assert one == MODEL.num_layers * 4 * size * (1 + MODEL.num_heads)
    assert many == MODEL.num_layers * 4 * size * (size + size + size)
    assert training_flops_per_token(flops) == 3 * flops


def test_peaks_are_measured() -> None:
    assert peak_flops(torch.device("cpu")) > 1e8
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= max(before, block.numel())
