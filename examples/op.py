"""The attention op in a training loop of your own (python op.py)."""

import torch
from torch import nn

from haloformer.kernels.dispatch import sliding_window_attention
from haloformer.kernels.spec import WindowSpec

torch.manual_seed(0)
spec = WindowSpec.from_two_sided(512, num_heads=4)  # 256 keys on either side of each token
project, back = nn.Linear(64, 3 * 64), nn.Linear(64, 64)
optimizer = torch.optim.AdamW([*project.parameters(), *back.parameters()], lr=1e-2)
tokens = torch.randn(2, 2048, 64)  # [B, N, E]
for step in range(20):
    query, key, value = project(tokens).unflatten(-1, (3, 4, 16)).unbind(2)  # each [B, N, H, D]
    out = back(sliding_window_attention(query, key, value, spec).flatten(2))
    loss = nn.functional.mse_loss(out, tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
