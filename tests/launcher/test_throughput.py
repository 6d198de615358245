"""FLOPs and parameters from a recipe's numbers agree with the model that is built from it."""

from collections.abc import Sequence

import numpy as np
import torch

from haloformer.configs.load import load_config
from haloformer.configs.sizes import num_parameters
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.launcher.plan_flops import Work, forward_flops, training_flops
from haloformer.launcher.plan_model import model_of
from haloformer.launcher.tasks import task_of
from haloformer.launcher.throughput import peak_flops, peak_memory_bytes
from haloformer.model.longformer import LongformerForMaskedLM

MODEL = load_config("enwiki_mlm", ["model.max_positions=64"]).model


def test_the_parameter_count_is_that_of_the_model() -> None:
    model = LongformerForMaskedLM(MODEL, 261)
    assert num_parameters(MODEL, 261) == sum(p.numel() for p in model.parameters())


def test_flops_are_the_textbook_terms() -> None:
    size, window = MODEL.hidden_size, 256

    def flops(num_globals: float, predicted: float) -> float:
        return forward_flops(model_of(MODEL, 261), Work(1.0, num_globals, predicted))

    layer = 2 * (4 * size * size + 2 * size * MODEL.ffn_size) + 4 * size * (window + 1)
    rows = flops(0, 0)
    assert rows == MODEL.num_layers * layer
    assert flops(0, 1) - rows == 2 * size * (size + 261)
    # A global column, and the global rows: folded, or with two projections of the sequence.
    assert flops(1, 0) - rows == MODEL.num_layers * 4 * size * (1 + MODEL.num_heads)
    assert flops(size, 0) - rows == MODEL.num_layers * 4 * size * (size + size + size)
    assert training_flops(model_of(MODEL, 261), Work(1.0, 0, 0)) == 3 * rows


def test_flops_of_a_led_batch_are_those_of_its_pairs_without_padding() -> None:
    config = load_config("wiki_led")
    lengths = ((5, 3), (2, 4))  # source, target

    def batch(pairs: Sequence[tuple[int, int]]) -> PairBatch:
        count = len(pairs)
        mask = np.arange(8) < np.array([n for n, _ in pairs])[:, None]
        real = np.arange(6) < np.array([t for _, t in pairs])[:, None]
        return PairBatch(
            input_ids=np.zeros((count, 8), np.int64),
            decoder_input_ids=np.zeros((count, 6), np.int64),
            labels=np.where(real, 7, -100),
            attention_mask=mask,
            global_positions=np.zeros((count, 1), np.int64),
            global_mask=np.ones((count, 1), np.bool_),
            sample_ids=np.arange(count),
            was_cut=np.zeros((count, 2), np.bool_),
            keys=(None,) * count,
            pad_multiple=1,
        )

    task = task_of(config)
    apart = sum(task.flops(config, 261, batch([pair])) for pair in lengths)
    assert task.flops(config, 261, batch(lengths)) == apart
    seen = Work(source=5, num_globals=1, predicted=3, target=3, pairs=15, seen=6)
    only = task.flops(config, 261, batch(lengths[:1]))
    assert only == training_flops(model_of(config.model, 261), seen)


def test_peaks_are_measured() -> None:
    assert peak_flops(torch.device("cpu")) > 1e8
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= max(before, block.numel())
