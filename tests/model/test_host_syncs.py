"""A training step never waits for the device: no number is read back between forward and optimizer.

On a CPU nothing waits, so the operations that would on a GPU are counted instead: those that hand
a tensor's content to Python, or whose result has as many elements as the content says.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from haloformer.kernels.sharded import SequenceShard
from haloformer.model.char_lm import CharLm
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.led import LedForConditionalGeneration, shift_right
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.targets import Targets
from model_layouts import LENGTH, TARGETS, VOCAB, char_config, led_config, longformer_config

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,  # item(), int(x), bool(x), `if x:`
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.bincount.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# The blocked attention for CPUs looks at each block's mask; GPUs run the Triton kernels.
OF_CPUS_ONLY = {"kernels/blocks.py"}
TREE = Path(__file__).resolve().parents[2]


class Waits(TorchDispatchMode):
    """Where in our files something would wait for a GPU, as "file: line of code"."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING or (func in INDEXING and any(is_mask(x) for x in args[1])):
            self.note(str(func))
        return func(*args, **({} if kwargs is None else kwargs))

    def note(self, otherwise):
        """The innermost line of ours; a formula of torch's own autograd has none."""
        place = otherwise
        for frame in reversed(traceback.extract_stack()[:-2]):
            path = Path(frame.filename)
            if path == Path(__file__):
                break
            if path.exists() and TREE in path.resolve().parents and ".venv" not in path.parts:
                place = f"{path.resolve().relative_to(TREE)}: {frame.line}"
                break
        self.places.add(place)


def is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@pytest.fixture
def waits(monkeypatch):
    """Also what reads a tensor's memory without an operation."""
    found = Waits()
    for name in ("tolist", "numpy", "cpu"):
        plain = getattr(torch.Tensor, name)

        def noted(self, *args, plain=plain, name=name, **kwargs):
            found.note(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noted)
    return found


def shard_of(length, num_globals):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -3:] = False  # padding
    return SequenceShard(
        group=None,
        rank=0,
        world_size=1,
        length=length,
        attention_mask=mask,
        segment_ids=None,
        global_positions=torch.zeros(2, num_globals, dtype=torch.int64),
        global_mask=torch.ones(2, num_globals, dtype=torch.bool),
        sample_ids=torch.arange(2),
    )


def masked_lm():
    ids = torch.randint(4, VOCAB, (2, LENGTH))
    labels = ids.where(torch.arange(LENGTH) % 5 == 1, -100)
    return LongformerForMaskedLM(longformer_config(), VOCAB), (
        ids,
        Targets.of(labels),
        shard_of(LENGTH, 1),
    )


def led():
    ids, labels = (torch.randint(4, VOCAB, (2, n)) for n in (LENGTH, TARGETS))
    labels[1, -2:] = -100
    inputs = (ids, shift_right(labels, 2, 1), Targets.of(labels), shard_of(LENGTH, 1))
    return LedForConditionalGeneration(led_config(), VOCAB), inputs


def char_lm():
    ids = torch.randint(4, VOCAB, (2, LENGTH))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return CharLm(char_config(), VOCAB), (ids, Targets.of(labels), shard_of(LENGTH, 0))


def test_what_would_wait_is_seen(waits):
    x = torch.arange(4)
    with waits:
        assert x.sum() == 6 and x.tolist() and x[x > 1].numel() == 2
        assert torch.nonzero(x).shape[0] == 3
    seen = {"aten._local_scalar_dense.default", "aten.index.Tensor", "aten.nonzero.default"}
    assert waits.places == {"tolist", *seen}


@pytest.mark.parametrize("make", [masked_lm, led, char_lm], ids=lambda make: make.__name__)
def test_a_step_waits_nowhere(make, waits):
    model, inputs = make()
    model.train()
    with waits:
        model(*inputs, DropoutStep(0, 1)).loss_sum.backward()
    places = {place for place in waits.places if place.split(":")[0] not in OF_CPUS_ONLY}
    assert not places, "\n".join(sorted(places))
