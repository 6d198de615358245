"""The planner's formulas: kept activations to the byte, parameters, FLOPs, halos, places."""

from dataclasses import replace

import pytest
import torch

from haloformer.configs.schema import TrainConfig
from haloformer.configs.sizes import num_parameters
from haloformer.kernels.halo import plan_halo
from haloformer.kernels.ranks import Direction
from haloformer.kernels.sharded import SequenceShard
from haloformer.launcher.plan_activations import embeddings_kept, head_of, layer_kept
from haloformer.launcher.plan_flops import Work, forward_flops
from haloformer.launcher.plan_memory import memory
from haloformer.launcher.plan_model import model_of, parts_of
from haloformer.launcher.plan_time import Place
from haloformer.launcher.plan_traffic import Flow, halo_rows
from haloformer.model.char_lm import CharLm
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.led import LedForConditionalGeneration
from haloformer.model.longformer import LongformerForMaskedLM
from plan_recipes import VOCAB, numbers, recipe

MODELS = {"mlm": LongformerForMaskedLM, "led": LedForConditionalGeneration, "char": CharLm}


def kept_by_autograd(kind, raw, num_globals):
    """Bytes of every storage that a forward pass saves, parameters left out."""
    config = TrainConfig.model_validate(raw)
    model, n = MODELS[kind](config.model, VOCAB), config.data.seq_len
    batch = config.batch.micro_batch
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def save(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no address is used twice
        return x

    shard = SequenceShard(
        None, 0, 1, n, torch.ones(batch, n, dtype=torch.bool), None,
        torch.arange(num_globals).expand(batch, -1).contiguous(),
        torch.ones(batch, num_globals, dtype=torch.bool), torch.arange(batch),
    )  # fmt: skip
    ids = torch.randint(5, VOCAB, (batch, n))
    labels = ids.clone()
    inputs = [ids, labels]
    if kind == "led":
        labels = torch.randint(5, VOCAB, (batch, config.data.target_len))
        inputs = [ids, labels, labels]
    elif kind == "mlm":
        labels[:, round(config.data.mask_probability * n) :] = -100
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        held = model(*inputs, shard, DropoutStep(0, 0))
    assert held.loss_sum.isfinite()
    return sum(storage.nbytes() for storage in found.values())


def forecast_kept(raw, num_globals):
    model, rows, split, _ = numbers(raw, 1, num_globals)
    kept = sum(layer_kept(model, layer, rows, split) for layer in model.layers)
    return kept + embeddings_kept(model, rows, split) + head_of(model, rows, split).kept


@pytest.mark.parametrize("num_globals", [2, 8])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mlm", {}),
        ("mlm", {"hidden_dropout": 0.0}),
        ("mlm", {"activation_dropout": 0.1}),
        ("char", {}),
        ("led", {}),
        ("led", {"activation_dropout": 0.1}),
    ],
)
def test_kept_activations_are_those_of_autograd_to_the_byte(kind, changes, num_globals):
    raw = recipe(kind, seq=64, **changes)
    assert forecast_kept(raw, num_globals) == kept_by_autograd(kind, raw, num_globals)


@pytest.mark.parametrize("kind", MODELS)
def test_kept_activations_of_several_sequences_are_forecast_but_for_copies_of_weights(kind):
    # Of folded projections of more than one sequence, einsum keeps the weights in another order.
    raw = recipe(kind, batch=3, micro=3, seq=64)
    found, size = kept_by_autograd(kind, raw, 2), 16
    copies = 0 if kind == "char" else 2 * 2 * size * size * 4
    assert 0 <= found - forecast_kept(raw, 2) <= copies


@pytest.mark.parametrize("kind", MODELS)
def test_parts_have_the_parameters_of_the_model(kind):
    config = TrainConfig.model_validate(recipe(kind)).model
    parts = parts_of(model_of(config, VOCAB), 1)
    assert sum(part.elements for part in parts) == num_parameters(config, VOCAB)


@pytest.mark.parametrize("reach", [(0, 0), (3, 0), (2, 5), (4, 4), (9, 13)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_halo_rows_are_those_of_the_kernels(ranks, reach):
    for rank in range(ranks):
        sent = {}
        for parcel in plan_halo(rank, ranks, 4, *reach).outgoing:
            assert (parcel.direction is Direction.RIGHT) == (parcel.peer > rank)
            sent[parcel.peer - rank] = parcel.rows.stop - parcel.rows.start
        assert halo_rows(rank, ranks, 4, *reach) == sent


def test_flops_of_a_decoder_count_pairs_of_rows_and_both_sides():
    model, *_ = numbers(recipe("led"), 1)
    size, layers = model.hidden, 2
    nothing = Work(0, 0, 0)
    assert forward_flops(model, nothing) == 0
    pairs = forward_flops(model, replace(nothing, pairs=1))
    assert pairs == forward_flops(model, replace(nothing, seen=1)) == layers * 4 * size
    target = forward_flops(model, replace(nothing, target=1))
    assert target == layers * 2 * (6 * size * size + 2 * size * 4 * size)
    source = forward_flops(model, replace(nothing, source=1))
    encoder = 2 * (4 * size * size + 2 * size * 4 * size) + 4 * size * 33 + 4 * size * size
    assert source == layers * (encoder + 4 * size * size) - layers * 4 * size * size
    assert forward_flops(model, replace(nothing, predicted=1)) == 2 * size * VOCAB


def test_a_ring_over_nodes_leaves_a_node_through_all_its_members():
    _, _, split, _ = numbers(recipe(context=4, batch=2), 8)
    place = Place(split, 4)
    ring = Flow("gradients", "zero", "all_reduce", 800, 1)
    assert place.link_bytes(0, ring) == (1400 * 3 // 4, 1400 // 4)
    within = Flow("globals", "context", "all_reduce", 800, 1)
    assert place.link_bytes(0, within) == (1200, 0)
    assert place.link_bytes(3, Flow("halo", "context", "send", 10, 1, 1)) == (0, 10)
    assert place.link_bytes(2, Flow("halo", "context", "send", 10, 1, 1)) == (10, 0)


def test_recompute_and_zero_spare_memory():
    def peak(**changes):
        return memory(*numbers(recipe(context=2, size=64, seq=4096, **changes), 2)).peak.total

    assert peak(recompute="full") < peak(recompute="selective") < peak()
    assert peak(zero=1) > peak(zero=1, precision="bf16")
