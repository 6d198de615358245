"""Longformer under DDP (torchrun --standalone --nproc-per-node 2 model_ddp.py)."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from haloformer.configs.models import ModelConfig
from haloformer.model.convert import plain_from_config
from haloformer.model.hf_config import TokenIds

dist.init_process_group("gloo")  # nccl on GPUs
sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "ffn_size": 256}
config = ModelConfig(**sizes, max_positions=1024, attention_window=64)
plain = plain_from_config(config, vocab_size=100, tokens=TokenIds(bos=0, pad=1, eos=2))
model = DistributedDataParallel(plain.train())  # or load_pretrained("longformer-base-4096")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
torch.manual_seed(dist.get_rank())  # each rank reads sequences of its own
for step in range(5):
    ids = torch.randint(3, 13, (2, 1024))  # [B, N]
    is_global = (torch.arange(1024) == 0).expand_as(ids)  # token 0 sees all, and all see it
    loss = model(ids, global_attention_mask=is_global, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()  # DDP averages the gradients
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")
dist.destroy_process_group()
