"""Generation on ranks that share a source; here, so that they need not import transformers."""

import torch
import torch.distributed

from haloformer.kernels.sharded import SequenceShard
from haloformer.model.convert import load_pretrained
from haloformer.model.generate import SearchSettings, generate


def sharded_answers(rank, world, folder, batch, settings, max_length):
    ids, mask, chosen = batch
    places = chosen.argmax(1, keepdim=True)
    shard = SequenceShard(
        group=torch.distributed.group.WORLD,
        rank=rank,
        world_size=world,
        length=ids.shape[1],
        attention_mask=mask.bool(),
        segment_ids=None,
        global_positions=places,
        global_mask=chosen.bool().gather(1, places),
        sample_ids=torch.arange(len(ids)),
    )
    model = load_pretrained(folder).model
    return [
        generate(model, shard.local(ids), shard, SearchSettings(max_length=max_length, **each))
        for each in settings
    ]
