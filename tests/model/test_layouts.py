"""Every model on 1, 2 and 4 context ranks and 2 tensor ranks equals one rank, dropout on."""

import pytest
import torch

from dist import run_ranks
from haloformer.model.dropout_sites import DropoutStep
from model_layouts import build, gradients, loss_of, source, walk

KINDS = ("mlm", "led", "char_lm", "classification", "qa", "choice", "coreference")
LAYERED = ("mlm", "led", "char_lm")
CASES = [
    *((kind, {}) for kind in KINDS),
    *(
        (kind, {"recompute": mode})
        for kind in ("mlm", "led", "char_lm")
        for mode in ("selective", "full")
    ),
]


@pytest.mark.parametrize(
    ("context", "tensor"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)], ids=lambda x: str(x)
)
def test_loss_and_gradients_equal_one_rank(context, tensor):
    answers = run_ranks(context * tensor, walk, context, tensor, CASES)
    for answer in answers:
        assert len(answer) == len(CASES)
        bad = {case: worst for case, worst in answer.items() if not worst[1] <= 1e-11}
        assert not bad, bad


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", LAYERED)
def test_recompute_changes_no_bit(kind, mode):
    loss, expected = gradients(kind, {}, dropout=True)
    other_loss, found = gradients(kind, {"recompute": mode}, dropout=True)
    assert loss == other_loss
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("kind", LAYERED)
def test_recompute_keeps_less(kind):
    kept = {}
    for mode in ("none", "selective", "full"):
        sizes = {}  # by storage: views of one buffer count once

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model = build(kind, recompute=mode)
        ids, shard = source()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_of(model, kind, shard, ids, DropoutStep(7, 5))
        for parameter in model.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        kept[mode] = sum(sizes.values())
    assert kept["full"] < 0.6 * kept["none"]
    assert kept["selective"] < 0.95 * kept["none"]


def test_dropout_matters_to_these_losses():
    for kind in KINDS:
        assert gradients(kind, {}, dropout=True)[0] != gradients(kind, {}, dropout=False)[0]
