"""transformers' models beside ours: random weights in memory, the same batch, every gradient."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from haloformer.model.convert import load_pretrained, parameter_names

VOCAB = 53
# Small, and no two sizes alike that could be taken for each other.
LONGFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 70,
    "attention_window": [4, 8],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ROBERTA = {
    **{key: size for key, size in LONGFORMER.items() if key != "attention_window"},
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}
LED = {
    **{key: size for key, size in BART.items() if key != "max_position_embeddings"},
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 40,
    "attention_window": [4, 8],
}
KEY_BIASES = (".key.bias", ".key_global.bias", ".k_proj.bias")


@contextlib.contextmanager
def softmax_in_own_precision():
    """transformers' softmax(..., dtype=float32) in the precision of its input.

    It rounds attention weights to float32 also where the model is float64; for a comparison to
    1e-9 it has to keep them. Nothing else of transformers is changed.
    """
    original = nn.functional.softmax

    def softmax(x, dim=None, dtype=None):
        return original(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    nn.functional.softmax = softmax
    try:
        yield
    finally:
        nn.functional.softmax = original


def scrambled(model, seed=0):
    """Weights far from their initial ones: transformers starts biases at 0 and norms at 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.3 * noise).to(parameter.dtype)
    return model


def batch(lengths, globals_, width=None, seed=0, vocab=VOCAB):
    """ids, attention_mask, global_attention_mask of rows of these lengths, padded with token 1.

    Args:
        lengths: Real tokens per row.
        globals_: Global positions per row.
        width: Tokens per row with padding; the longest row if None.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) if width is None else width
    ids = torch.randint(3, vocab, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[~mask] = 1
    chosen = torch.zeros_like(mask)
    for row, places in enumerate(globals_):
        chosen[row, places] = True
    return ids, mask.long(), chosen.long()


def both(peer, folder, dtype):
    """Save a transformers model, load it as ours; both in train mode, their dropout is 0."""
    peer.save_pretrained(folder)
    return peer.to(dtype).train(), load_pretrained(folder, dtype).train()


def assert_same_gradients(ours, peer, tolerance):
    """Every parameter of both, relative to its largest entry.

    Softmax does not change when all logits of a row move together, so the gradient of a key bias
    is zero but for rounding; it is measured by that of the weight beside it.
    """
    theirs = dict(peer.named_parameters())
    names = parameter_names(ours)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    assert {names[name] for name in gradients} == set(theirs)
    worst = {}
    for name, mine in gradients.items():
        reference = theirs[names[name]].grad
        # transformers leaves out what no token used; ours computes with zero rows.
        reference = torch.zeros_like(mine) if reference is None else reference
        mine = torch.zeros_like(reference) if mine is None else mine
        scale = max(float(reference.abs().max()), 1e-3 * largest)
        if names[name].endswith(KEY_BIASES):
            weight = theirs[names[name].removesuffix("bias") + "weight"].grad
            scale = max(scale, 0.0 if weight is None else float(weight.abs().max()))
        worst[name] = float((mine - reference).abs().max()) / scale
    bad = {name: error for name, error in worst.items() if not error <= tolerance}
    assert not bad, bad


def relative_error(ours, reference):
    ours, reference = ours.detach(), reference.detach()
    return float((ours - reference).abs().max() / reference.abs().max())
