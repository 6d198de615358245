"""Our parameter names <-> transformers': one table per architecture, read in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Names = dict[str, str]  # ours -> theirs

_ATTENTION = ("query", "key", "value", "query_global", "key_global", "value_global")
_PROJECTIONS = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj"))

# Copies of tied weights, buffers of older versions, and the pooler that published RoBERTas carry
# though no head uses it: a folder may hold them in addition.
IGNORABLE = (
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "embeddings.position_ids",
    "longformer.embeddings.position_ids",
    "longformer.pooler.dense.weight",
    "longformer.pooler.dense.bias",
    "final_logits_bias",
    "lm_head.weight",
    "led.encoder.embed_tokens.weight",
    "led.decoder.embed_tokens.weight",
)


def affine(ours: str, theirs: str) -> Names:
    """Weight and bias of a linear or norm."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


def longformer_encoder(num_layers: int, prefix: str, ours: str = "encoder.") -> Names:
    """Embeddings and layers.

    Args:
        num_layers: Number of layers.
        prefix: What transformers puts before: ``longformer.`` below a head, nothing without.
        ours: What stands before on our side.
    """
    names = {
        f"{ours}embeddings.{kind}_embeddings.weight": f"{prefix}embeddings.{kind}_embeddings.weight"
        for kind in ("word", "position", "token_type")
    }
    names |= affine(f"{ours}embeddings.norm", f"{prefix}embeddings.LayerNorm")
    for index in range(num_layers):
        a, b = f"{ours}layers.{index}.", f"{prefix}encoder.layer.{index}."
        for part in _ATTENTION:
            names |= affine(f"{a}attention.{part}", f"{b}attention.self.{part}")
        names |= affine(f"{a}attention.output", f"{b}attention.output.dense")
        names |= affine(f"{a}attention_norm", f"{b}attention.output.LayerNorm")
        names |= affine(f"{a}ffn_in", f"{b}intermediate.dense")
        names |= affine(f"{a}ffn_out", f"{b}output.dense")
        names |= affine(f"{a}ffn_norm", f"{b}output.LayerNorm")
    return names


def led(num_encoder_layers: int, num_decoder_layers: int) -> Names:
    """Every parameter of an LED; ``final_logits_bias`` is apart, transformers gives it a row."""
    names = {"shared.weight": "led.shared.weight"}
    for side in ("encoder", "decoder"):
        names[f"{side}.embeddings.positions.weight"] = f"led.{side}.embed_positions.weight"
        names |= affine(f"{side}.embeddings.norm", f"led.{side}.layernorm_embedding")
    for index in range(num_encoder_layers):
        a, b = f"encoder.layers.{index}.", f"led.encoder.layers.{index}."
        for part in _ATTENTION:
            names |= affine(f"{a}attention.{part}", f"{b}self_attn.longformer_self_attn.{part}")
        names |= affine(f"{a}attention.output", f"{b}self_attn.output")
        names |= _feed_forward(a, b)
    for index in range(num_decoder_layers):
        a, b = f"decoder.layers.{index}.", f"led.decoder.layers.{index}."
        for ours, theirs in (("attention", "self_attn"), ("cross", "encoder_attn")):
            for part, proj in _PROJECTIONS:
                names |= affine(f"{a}{ours}.{part}", f"{b}{theirs}.{proj}")
        names |= affine(f"{a}cross_norm", f"{b}encoder_attn_layer_norm")
        names |= _feed_forward(a, b)
    return names


def _feed_forward(a: str, b: str) -> Names:
    return {
        **affine(f"{a}attention_norm", f"{b}self_attn_layer_norm"),
        **affine(f"{a}ffn_in", f"{b}fc1"),
        **affine(f"{a}ffn_out", f"{b}fc2"),
        **affine(f"{a}ffn_norm", f"{b}final_layer_norm"),
    }


LM_HEAD: Names = {
    **affine("head.dense", "lm_head.dense"),
    **affine("head.norm", "lm_head.layer_norm"),
    "head.bias": "lm_head.bias",
}
CLASSIFIER: Names = {
    **affine("head.dense", "classifier.dense"),
    **affine("head.output", "classifier.out_proj"),
}
QA_HEAD: Names = affine("head.output", "qa_outputs")
POOLER: Names = affine("pooler", "pooler.dense")


def ours_from_theirs(
    names: Names, weights: Mapping[str, Tensor], ignorable: Iterable[str]
) -> dict[str, Tensor]:
    """A state dict of ours from the tensors of a folder.

    Args:
        names: Ours -> theirs.
        weights: By their names.
        ignorable: Their names that may be there in addition.

    Raises:
        ValueError: Naming what is missing and what nobody asked for.
    """
    missing = sorted(theirs for theirs in names.values() if theirs not in weights)
    surplus = sorted(set(weights) - set(names.values()) - set(ignorable))
    if missing or surplus:
        parts = []
        if missing:
            parts.append(f"lacks {_some(missing)}")
        if surplus:
            parts.append(f"has {_some(surplus)}, which this architecture does not use")
        raise ValueError(f"the safetensors file {' and '.join(parts)}; check config.json")
    return {ours: weights[theirs] for ours, theirs in names.items()}


def theirs_from_ours(names: Names, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder from a state dict of ours."""
    assert set(state) == set(names), set(state) ^ set(names)
    return {theirs: state[ours] for ours, theirs in names.items()}


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
