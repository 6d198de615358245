"""What one layout saved, the same layout continues bit for bit, and any other to fp32 noise."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from haloformer.launcher import runtime
from haloformer.launcher.fragments import load_weights, take_snapshot
from layouts import (
    BF16,
    ELASTIC,
    FP32,
    SAVED_AT,
    VOCAB,
    WIDTH,
    Case,
    saved_tensors,
    tiny_model,
)

RESUMED = [case for case in FP32 + BF16 if case.micro == 1]


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_the_same_layout_continues_bit_for_bit(case, walked):
    seen, folder = walked
    assert seen["resumed"][str(case)] == seen["trained"][str(case)][SAVED_AT:]
    uninterrupted = saved_tensors(folder / str(case) / "end")
    resumed = saved_tensors(folder / str(case) / "resumed")
    assert uninterrupted.keys() == resumed.keys()
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(("writer", "reader"), ELASTIC, ids=str)
def test_another_layout_continues_to_fp32_noise(writer, reader, walked):
    seen, _ = walked
    continued = seen["elastic"][str(writer), str(reader)]
    tolerance = 1e-6 if writer.precision == "fp32" else 1e-2
    for ours, truth in zip(continued, seen["trained"][str(writer)][SAVED_AT:], strict=True):
        assert ours == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize("case", [Case(2, 2, 0), Case(2, 2, 1), Case(2, 2, 3)], ids=str)
def test_every_rank_writes_its_share_as_safetensors(case, walked):
    _, folder = walked
    files = [path for path in (folder / str(case)).iterdir() if path.is_file()]
    assert len(files) == 4
    assert {path.suffix for path in files} == {".safetensors"}
    sizes = sorted(path.stat().st_size for path in files)
    assert sizes[-1] < 2 * sizes[0]


@pytest.mark.parametrize("case", [Case(1, 2, 1, tensor=2), Case(1, 1, 3, tensor=4)], ids=str)
def test_tensor_ranks_write_one_slice_each_of_whole_unpadded_parameters(case, walked):
    _, folder = walked
    keys = []
    for file in sorted((folder / str(case)).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stored:
            keys += stored.keys()
    blocks = 36 // case.tensor  # of the 36 columns of the one matrix that is split by input
    named = {f"weight/outer.weight[:,{i}:{i + blocks}]" for i in range(0, 36, blocks)}
    assert {key for key in keys if key.startswith("weight/outer.weight")} == named
    parameters = [name for name, _ in tiny_model(None).named_parameters()]
    for name in parameters:
        slices = [key for key in keys if key.partition("[")[0] == f"weight/{name}"]
        assert 1 <= len(slices) <= case.world, name
    saved = saved_tensors(folder / str(case))
    assert saved["weight/embedding.weight"].numel() == VOCAB * WIDTH  # odd, and padded in memory
    assert saved["weight/head_bias"].numel() == VOCAB


@pytest.mark.parametrize("writer", [Case(2, 2, 3), Case(1, 1, 3, tensor=4)], ids=str)
def test_a_plain_model_takes_the_weights(walked, writer):
    _, folder = walked
    model = tiny_model(None)
    source = folder / str(writer) / "end"
    load_weights(model, source)
    saved = saved_tensors(source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), saved[f"weight/{name}"]), name


def test_another_model_is_refused_by_name(walked):
    _, folder = walked
    model = tiny_model(None)
    model.outer = nn.Linear(3 * WIDTH, 2 * WIDTH)
    with pytest.raises(ValueError, match=r"another model \(exp_avg/outer\.bias: 12 .* 24 wanted"):
        load_weights(model, folder / str(Case(2, 2, 3)))
    model = tiny_model(None)
    del model.head_bias
    with pytest.raises(ValueError, match=rf"exp_avg/head_bias: {VOCAB} elements saved, none"):
        load_weights(model, folder / str(Case(2, 2, 3)))


class BareEngine:
    """Stands where an engine would; the refusals below come before it or a topology is used."""

    def __init__(self, module):
        self.module = module


def test_a_persistent_buffer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_batches_tracked is a persistent buffer"):
        take_snapshot(BareEngine(nn.BatchNorm1d(2)), None)


def test_another_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "DEEPSPEED_VERSION", "9.9")
    with pytest.raises(ValueError, match=r"pip install deepspeed==9\.9"):
        take_snapshot(BareEngine(nn.Linear(2, 2)), None)
