"""Ranks that share a sequence (torchrun --standalone --nproc-per-node 2 model_context.py)."""

import torch
import torch.distributed as dist

from haloformer.configs.models import ModelConfig
from haloformer.kernels.shard import SequenceShard
from haloformer.model.longformer import LongformerForMaskedLM

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights and the same sequences on every rank
sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "ffn_size": 256}
model = LongformerForMaskedLM(ModelConfig(**sizes, max_positions=1024, attention_window=64), 100)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
place = (dist.group.WORLD, dist.get_rank(), dist.get_world_size(), 1024)
real, token_0, used = torch.ones(2, 1024).bool(), torch.zeros(2, 1).long(), torch.ones(2, 1).bool()
shard = SequenceShard(*place, real, None, token_0, used, sample_ids=torch.arange(2))
for step in range(5):
    mine = shard.local(torch.randint(3, 13, (2, 1024)))  # [B, N / ranks]
    loss = model(mine, labels=mine, shard=shard).loss_sum / real.sum()
    optimizer.zero_grad()
    loss.backward()
    for weight in model.parameters():
        dist.all_reduce(weight.grad)  # the sum over the ranks of the sequence
    dist.all_reduce(loss.detach_())
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")
dist.destroy_process_group()
