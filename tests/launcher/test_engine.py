"""Every layout trains like plain torch in one process: losses, gradient norms, gradients."""

import pytest
import torch
from torch import nn

from haloformer.launcher.engine import (
    accumulation_steps,
    build_engine,
    parameter_groups,
    set_learning_rate,
)
from layouts import (
    BF16,
    FP32,
    SAVED_AT,
    STEPS,
    TENSOR,
    Case,
    global_batch,
    saved_tensors,
    tiny_config,
    tiny_model,
)


@pytest.fixture(scope="module")
def plain():
    """History of (loss, norm), and AdamW's first moments after SAVED_AT steps, by plain torch."""
    config, model = tiny_config(Case(1, 1, 0)), tiny_model(None)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim), betas=optim.betas, eps=optim.eps, lr=0.0
    )
    history, moments = [], {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        ids, labels = global_batch(step)
        loss = model(ids, labels) / (labels != -100).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
        if step + 1 == SAVED_AT:
            moments = {
                f"exp_avg/{name}": optimizer.state[p]["exp_avg"].flatten().clone()
                for name, p in model.named_parameters()
            }
    return history, moments


@pytest.mark.parametrize("case", FP32, ids=str)
def test_losses_and_norms_equal_plain_torch(case, walked, plain):
    seen, _ = walked
    for step, (ours, truth) in enumerate(zip(seen["trained"][str(case)], plain[0], strict=True)):
        assert ours == pytest.approx(truth, rel=1e-6), f"step {step}"


@pytest.mark.parametrize("case", FP32, ids=str)
def test_gradients_equal_plain_torch(case, walked, plain):
    # The first moment is linear in the clipped gradients, so it shows a wrong one at any element.
    _, folder = walked
    saved = saved_tensors(folder / str(case))
    for name, truth in plain[1].items():
        torch.testing.assert_close(saved[name], truth, rtol=1e-5, atol=1e-6 * truth.abs().max())


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_follows_fp32(case, walked, plain):
    seen, _ = walked
    for ours, truth in zip(seen["trained"][str(case)], plain[0], strict=True):
        assert ours == pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("case", [c for c in TENSOR if c.stage < 3], ids=str)
def test_tensor_ranks_keep_the_same_copies_bit_for_bit(case, walked):
    copies = walked[0]["copies"][str(case)]
    assert len(copies) == case.world and len(copies[0]) == 3
    assert all(copy == copies[0] for copy in copies)


def test_clipping_is_at_work(plain):
    assert all(norm > tiny_config(Case(1, 1, 0)).optim.clip_norm for _, norm in plain[0])


def test_the_engine_starts_without_a_word_and_without_a_compiler(walked):
    seen, folder = walked
    assert seen["said"] == ""
    assert not (folder / "compiled").exists()


def test_vectors_do_not_decay():
    model = tiny_model(None)
    decaying, still = parameter_groups(model, tiny_config(Case(1, 1, 0)).optim)
    assert decaying["weight_decay"] == 0.1 and still["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in still["params"]} == {
        "head_bias",
        "inner.bias",
        "outer.bias",
        "norm.weight",
        "norm.bias",
    }
    assert len(decaying["params"]) + len(still["params"]) == len(names)


def test_an_empty_group_is_left_out():
    assert len(parameter_groups(nn.Embedding(3, 2), tiny_config(Case(1, 1, 0)).optim)) == 1


def test_accumulation_ignores_context_ranks():
    assert accumulation_steps(tiny_config(Case(1, 2, 1)), 1) == 4
    assert accumulation_steps(tiny_config(Case(2, 2, 1)), 2) == 2
    with pytest.raises(ValueError, match=r"global_batch 4 is not a multiple of .* = 3"):
        accumulation_steps(tiny_config(Case(1, 1, 1)), 3)


def test_a_frozen_parameter_is_refused():
    model = tiny_model(None)
    model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"norm\.weight is frozen"):
        build_engine(model, tiny_config(Case(1, 1, 1)), None)


def test_the_learning_rate_reaches_every_group():
    class Stub:
        optimizer = torch.optim.AdamW(
            parameter_groups(tiny_model(None), tiny_config(Case(1, 1, 0)).optim)
        )

    set_learning_rate(Stub, 0.25)
    assert [group["lr"] for group in Stub.optimizer.param_groups] == [0.25, 0.25]
