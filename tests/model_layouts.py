"""Every model on every split of ranks: loss and gradients as on one rank.

``walk`` runs in the ranks of ``dist.run_ranks``. A layout is (context ranks, tensor ranks); rank
number = context rank * tensor ranks + tensor rank.
"""

from __future__ import annotations

import torch
import torch.distributed

from haloformer.configs.models import CharLmConfig, CorefConfig, LedConfig, ModelConfig
from haloformer.kernels.sharded import SequenceShard
from haloformer.model.char_lm import CharLm
from haloformer.model.classification import LongformerForSequenceClassification
from haloformer.model.coreference import LongformerForCoreference
from haloformer.model.dropout_sites import DropoutStep
from haloformer.model.led import LedForConditionalGeneration, shift_right
from haloformer.model.longformer import LongformerForMaskedLM
from haloformer.model.multiple_choice import LongformerForMultipleChoice
from haloformer.model.question_answering import LongformerForQuestionAnswering

VOCAB, LENGTH, TARGETS = 37, 24, 8  # 37: an odd vocabulary has to be padded for two tensor ranks


def encoder_settings(**more):
    settings = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 24,
        "max_positions": LENGTH,
        "attention_window": [4, 20],
        "dilation": [1, 1, 2, 1],
        "initializer_range": 0.3,
    }
    return {**settings, **more}


def longformer_config(**more):
    return ModelConfig(**encoder_settings(**more))


def led_config(**more):
    settings = {
        "hidden_size": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_heads": 4,
        "decoder_heads": 2,
        "encoder_ffn_size": 24,
        "decoder_ffn_size": 20,
        "max_source_positions": LENGTH,
        "max_target_positions": TARGETS,
        "attention_window": [4, 20],
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "label_smoothing": 0.1,
        "initializer_range": 0.3,
    }
    return LedConfig(**{**settings, **more})


def char_config(**more):
    settings = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 24,
        "max_positions": LENGTH,
        "attention_window": [4, 12],
        "dilation": [1, 3],
        "attention_dropout": 0.1,
        "initializer_range": 0.3,
    }
    return CharLmConfig(**{**settings, **more})


def build(kind, tensor_group=None, **more):
    """A model with the same weights whatever the layout."""
    torch.manual_seed(3)
    if kind == "led":
        return LedForConditionalGeneration(led_config(**more), VOCAB, tensor_group).double()
    if kind == "char_lm":
        return CharLm(char_config(**more), VOCAB, tensor_group).double()
    if kind == "coreference":
        # A span of eight reaches over a whole rank of four.
        sizes = {"max_span_width": 8, "top_span_ratio": 0.5, "num_antecedents": 5, **more}
        config = CorefConfig(**encoder_settings(**sizes))
        return LongformerForCoreference(config, VOCAB, tensor_group).double()
    config = longformer_config(**more)
    if kind == "classification":
        return LongformerForSequenceClassification(config, VOCAB, 5, tensor_group).double()
    cls = {
        "mlm": LongformerForMaskedLM,
        "qa": LongformerForQuestionAnswering,
        "choice": LongformerForMultipleChoice,
    }[kind]
    return cls(config, VOCAB, tensor_group).double()


def source(group=None, rank=0, world=1):
    """Ids [B, N] and the shard: ragged rows, two globals on one rank, one row without any."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([LENGTH, 17, 9])
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator).masked_fill(~mask, 1)
    shard = SequenceShard(
        group=group,
        rank=rank,
        world_size=world,
        length=LENGTH,
        attention_mask=mask,
        segment_ids=None,
        global_positions=torch.tensor([[0, 13, 14], [5, 0, 0], [0, 0, 0]]),
        global_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool),
        sample_ids=torch.tensor([4, 9, 2]),
    )
    return ids, shard


def loss_of(model, kind, shard, ids, step):
    """This rank's share of the loss; whole-sequence inputs are cut here."""
    mine = shard.local(ids)
    generator = torch.Generator().manual_seed(2)
    if kind == "led":
        labels = torch.randint(3, VOCAB, (3, TARGETS), generator=generator)
        labels[torch.arange(TARGETS) >= torch.tensor([TARGETS, 5, 1])[:, None]] = -100
        rows = TARGETS // shard.world_size
        cut = slice(shard.rank * rows, (shard.rank + 1) * rows)
        decoder_ids = shift_right(labels, 2, 1)
        return model(mine, decoder_ids[:, cut], labels[:, cut], shard, step).loss_sum
    if kind == "classification":
        return model(mine, torch.tensor([1, 4, 0]), shard, step).loss_sum
    if kind == "qa":
        spans = torch.tensor([[[2, 4], [15, 16]], [[16, 16], [-1, -1]], [[-1, -1], [-1, -1]]])
        return model(mine, spans, shard, step).loss_sum
    if kind == "choice":
        candidates = torch.tensor([[3, 9, 20], [2, 16, 0], [1, 0, 0]])
        used = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
        return model(mine, candidates, used, torch.tensor([2, 0, -100]), shard, step).loss_sum
    if kind == "coreference":
        # Every short span is a mention, of cluster 0 or 1: some are always kept.
        mentions = [[i, i + w, i % 2] for i in range(LENGTH - 1) for w in range(8)]
        labels = torch.tensor([mentions, mentions, [[-1, -1, -1]] * len(mentions)])
        return model(mine, labels, shard, step).loss_sum
    if kind == "char_lm":
        following = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], dim=1)
        labels = following.masked_fill(~shard.attention_mask, -100)
        return model(mine, shard.local(labels), shard, step).loss_sum
    chosen = (torch.rand(ids.shape, generator=generator) < 0.4) & shard.attention_mask
    labels = torch.where(chosen, ids, -100)
    return model(mine, shard.local(labels), shard, step).loss_sum


def gradients(kind, settings, *, dropout):
    """Loss and gradients of one rank alone: {name: tensor}."""
    model = build(kind, **settings)
    ids, shard = source()
    loss = loss_of(model, kind, shard, ids, DropoutStep(7, 5) if dropout else None)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def walk(rank, world, context, tensor, cases):
    """Worst relative error of loss and gradients of every case, against one rank alone."""
    context_group = tensor_group = None
    for first in range(0, world, tensor):
        group = torch.distributed.new_group(list(range(first, first + tensor)))
        tensor_group = group if first == rank // tensor * tensor else tensor_group
    for first in range(tensor):
        group = torch.distributed.new_group(list(range(first, world, tensor)))
        context_group = group if first == rank % tensor else context_group
    return {
        (kind, tuple(settings.items())): compare(
            kind, settings, context_group, tensor_group if tensor > 1 else None
        )
        for kind, settings in cases
    }


def compare(kind, settings, context_group, tensor_group):
    expected_loss, expected = gradients(kind, settings, dropout=True)
    model = build(kind, tensor_group, **settings)
    ids, shard = source(context_group, context_group.rank(), context_group.size())
    loss = loss_of(model, kind, shard, ids, DropoutStep(7, 5))
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=context_group)
    errors = {"loss": abs(total.item() - expected_loss) / abs(expected_loss)}
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, parameter in model.named_parameters():
        reference = my_slice(parameter, expected[name], tensor_group)
        torch.distributed.all_reduce(parameter.grad, group=context_group)
        errors[name] = float((parameter.grad - reference).abs().max()) / largest
    worst = max(errors, key=errors.get)
    return worst, errors[worst]


def my_slice(parameter, whole, tensor_group):
    """This tensor rank's part of a whole tensor, as the layer that owns the parameter splits it."""
    if parameter.shape == whole.shape:
        return whole
    assert parameter.tensor_model_parallel
    (dim,) = (d for d in range(whole.dim()) if parameter.shape[d] != whole.shape[d])
    assert dim == parameter.partition_dim
    share = parameter.shape[dim]
    padding = share * tensor_group.size() - whole.shape[dim]
    padded = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])]) if padding else whole
    return padded.narrow(dim, tensor_group.rank() * share, share)
