"""Three steps of a loaded model on ranks that share a sequence, written back by rank 0."""

import torch
import torch.distributed

from haloformer.kernels.sharded import SequenceShard
from haloformer.model.convert import load_pretrained, save_pretrained
from haloformer.model.led import shift_right


def train_and_export(rank, world, source, target, batch, labels):
    """Train ``source`` by SGD, sequence split over the ranks; returns our logits after it."""
    ids, mask, chosen = batch
    shard = shard_of(torch.distributed.group.WORLD, rank, world, mask, chosen)
    plain = load_pretrained(source)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for _ in range(3):
        if labels.shape == ids.shape:
            output = plain.model(shard.local(ids), shard.local(labels), shard)
        else:
            rows = labels.shape[1] // world
            cut = slice(rank * rows, (rank + 1) * rows)
            shifted = shift_right(labels, 2, 1)
            output = plain.model(shard.local(ids), shifted[:, cut], labels[:, cut], shard)
        (output.loss_sum / (labels != -100).sum()).backward()
        for parameter in plain.parameters():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        save_pretrained(plain, target)
    with torch.no_grad():
        more = {} if labels.shape == ids.shape else {"labels": labels}
        return plain(ids, mask, chosen, **more).logits


def shard_of(group, rank, world, mask, chosen):
    most = int(chosen.sum(1).max())
    places = torch.argsort(1 - chosen, dim=1, stable=True)[:, :most]
    return SequenceShard(
        group=group,
        rank=rank,
        world_size=world,
        length=mask.shape[1],
        attention_mask=mask.bool(),
        segment_ids=None,
        global_positions=places,
        global_mask=chosen.bool().gather(1, places),
        sample_ids=torch.arange(len(mask)),
    )
