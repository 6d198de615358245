"""No work of LED is done twice: the ranks' matrix products add up to those of one rank."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dist import run_ranks
from haloformer.configs.schema import LedConfig
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.led import LedForConditionalGeneration

SOURCE, TARGETS, SIZE = 512, 64, 32
CONFIG = LedConfig(
    hidden_size=SIZE,
    encoder_layers=1,
    decoder_layers=2,
    encoder_heads=2,
    decoder_heads=2,
    encoder_ffn_size=64,
    decoder_ffn_size=64,
    max_source_positions=SOURCE,
    max_target_positions=TARGETS,
    attention_window=16,
)


def linear_flops(x_shape, weight_shape, *rest, out_shape=None):
    """torch's counter does not know oneDNN's linear."""
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


KNOWN_TOO = {torch.ops.mkldnn._linear_pointwise: linear_flops}


def flops(rank, world_size):
    """Floating-point operations of this rank, forward and backward: encoder, decoder."""
    torch.manual_seed(0)
    model = LedForConditionalGeneration(CONFIG, 100)
    shard = SequenceShard(
        group=torch.distributed.group.WORLD,
        rank=rank,
        world_size=world_size,
        length=SOURCE,
        attention_mask=torch.ones(1, SOURCE, dtype=torch.bool),
        segment_ids=None,
        global_positions=torch.zeros(1, 1, dtype=torch.int64),
        global_mask=torch.ones(1, 1, dtype=torch.bool),
        sample_ids=torch.tensor([0]),
    )
    ids = torch.randint(3, 100, (1, SOURCE))
    rows = TARGETS // world_size
    with FlopCounterMode(display=False, custom_mapping=KNOWN_TOO) as encoder:
        memory = model.encode(shard.local(ids), shard, None)
        memory.sum().backward()
    memory = memory.detach().requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=KNOWN_TOO) as decoder:
        model.decode(ids[:, rank * rows : (rank + 1) * rows], memory, shard, None).sum().backward()
    return encoder.get_total_flops(), decoder.get_total_flops()


@pytest.fixture(scope="module")
def counted():
    return {size: run_ranks(size, flops, timeout=120.0) for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_does_its_share_of_encoder_and_decoder(size, counted):
    for part, whole in enumerate(counted[1][0]):
        shares = [found[part] / whole for found in counted[size]]
        assert max(shares) <= 1.02 / size
        assert sum(shares) >= 0.95  # and what is not done twice is done
