"""transformers' LED: loaded, equal in value and gradient, written back; label smoothing."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_peers
from haloformer.model.convert import load_pretrained, save_pretrained
from haloformer.model.led import shift_right
from haloformer.model.vocab_loss import token_loss

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

# name: (attention_window, source lengths, source width, globals per row, target lengths)
CASES = {
    "several_globals": ([4, 8], [32, 32], None, [[0, 5, 31], [0, 1, 2]], [7, 4]),
    "counts_differ": ([6, 6], [30, 24, 30], None, [[0], [3, 9, 23], []], [5, 9, 1]),
    "padding_not_of_window": ([4, 12], [29, 17], 31, [[0, 28], [16]], [6, 6]),
    "odd_length": ([8, 4], [37, 23], None, [[0], [22, 0]], [3, 11]),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def peer_config(window, **more):
    return transformers.LEDConfig(
        **{**hf_peers.LED, "attention_window": window, "init_std": 0.2, **more}
    )


def peer_model(window, **more):
    peer = hf_peers.scrambled(transformers.LEDForConditionalGeneration(peer_config(window, **more)))
    peer.final_logits_bias.normal_(generator=torch.Generator().manual_seed(5))
    return peer


def call_of(case):
    window, lengths, width, places, target_lengths = CASES[case]
    ids, mask, chosen = hf_peers.batch(lengths, places, width)
    labels, target_mask, _ = hf_peers.batch(target_lengths, [], seed=7)
    labels[target_mask == 0] = -100
    return window, {
        "input_ids": ids,
        "attention_mask": mask,
        "global_attention_mask": chosen,
        "labels": labels,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_led_equals_transformers(case, dtype, tmp_path):
    window, call = call_of(case)
    theirs, ours = hf_peers.both(peer_model(window), tmp_path / "peer", dtype)
    with hf_peers.softmax_in_own_precision():
        reference = theirs(**call)
        reference.loss.backward()
    found = ours(**call)
    found.loss.backward()
    for name in ("loss", "logits"):
        error = hf_peers.relative_error(getattr(found, name), getattr(reference, name))
        assert error <= TOLERANCE[dtype], (name, error)
    hf_peers.assert_same_gradients(ours, theirs, TOLERANCE[dtype])


def test_decoder_input_may_be_given_or_come_from_the_source(tmp_path):
    _, call = call_of("several_globals")
    theirs, ours = hf_peers.both(peer_model([4, 8]), tmp_path / "peer", torch.float32)
    del call["labels"]
    given = torch.tensor([[2, 9, 8], [2, 7, 7]])
    with torch.no_grad():
        for more in ({}, {"decoder_input_ids": given}):
            found, reference = ours(**call, **more).logits, theirs(**call, **more).logits
            assert found.shape == reference.shape
            assert hf_peers.relative_error(found, reference) < 1e-5


def test_export_gives_transformers_the_same_model(tmp_path):
    peer = peer_model([6, 6])
    _, ours = hf_peers.both(peer, tmp_path / "peer", torch.float32)
    save_pretrained(ours, tmp_path / "out")
    original = load_file(tmp_path / "peer" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)
    again = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    _, call = call_of("counts_differ")
    with torch.no_grad():
        found, reference = again(**call).logits, peer.eval()(**call).logits
    assert hf_peers.relative_error(found, reference) < 1e-6


def test_target_longer_than_the_positions_is_refused(tmp_path):
    peer_model([4, 8]).save_pretrained(tmp_path)
    ids = hf_peers.batch([12], [[]])[0]
    with pytest.raises(ValueError, match="41 tokens is longer than the 40 positions"):
        load_pretrained(tmp_path)(ids, labels=torch.full((1, 41), 5))


def test_shift_right_puts_the_start_token_first_and_padding_for_ignored():
    labels = torch.tensor([[5, 6, 7, 2, -100]])
    assert shift_right(labels, 2, 1).tolist() == [[2, 5, 6, 7, 2]]
    assert shift_right(torch.tensor([[5, -100, -100]]), 2, 1).tolist() == [[2, 5, 1]]


def test_label_smoothing_is_that_of_fairseq():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (6,), generator=generator)
    epsilon = 0.2
    # fairseq.criterions.label_smoothed_cross_entropy.label_smoothed_nll_loss, reduced per token
    log_probs = torch.log_softmax(logits, -1)
    nll = -log_probs.gather(1, targets[:, None])[:, 0]
    smooth = -log_probs.sum(-1)
    other = epsilon / (11 - 1)
    expected = (1.0 - epsilon - other) * nll + other * smooth
    weights = torch.randn(6, generator=generator, dtype=torch.float64)
    (reference,) = torch.autograd.grad((expected * weights).sum(), logits, retain_graph=True)
    found = token_loss(logits, targets, 11, label_smoothing=epsilon)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, reference)


def test_loss_without_smoothing_is_cross_entropy_and_takes_no_rows():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3])
    found = token_loss(logits, targets, 7)
    torch.testing.assert_close(
        found, torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    assert torch.autograd.gradcheck(lambda x: token_loss(x, targets, 7), logits)
    empty = token_loss(logits[:0], targets[:0], 7).sum()
    empty.backward()
    assert empty == 0 and not logits.grad.any()
