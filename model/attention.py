"""Longformer self-attention: local and global projections around the sharded attention op."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from haloformer.kernels.global_tokens import gather_global_rows
from haloformer.kernels.sharded import (
    AttentionDropoutSites,
    DropoutSite,
    SequenceShard,
    global_attention,
    sharded_band,
)
from haloformer.kernels.spec import WindowSpec
from haloformer.model.dropout_sites import DropoutStep, Site
from haloformer.model.global_rows import GlobalKey, GlobalValue, answer_global_rows
from haloformer.model.layers import column_linear, plain_linear, row_linear
from haloformer.model.windows import WindowedAttention


class LongformerSelfAttention(WindowedAttention):
    """Sliding-window attention plus global tokens with projections of their own (section 3.1).

    ::

        window 2, global token 0 (g):     g 1 2 3 4 5
                                      g   # # # # # #    row g: query_global/key_global/value_global
                                      1   # # # . . .    rows 1-5: query/key/value, one softmax over
                                      2   # # # # . .    the window and the global columns
                                      3   # . # # # .
                                      4   # . . # # #
                                      5   # . . . # #
    """

    def __init__(
        self,
        hidden_size: int,
        spec: WindowSpec,
        layer: int,
        *,
        dropout: float,
        std: float,
        tensor_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.layer, self.dropout = layer, dropout
        self.head_dim = hidden_size // spec.num_heads
        self.set_window(spec, tensor_group)

        def column() -> nn.Module:
            return column_linear(hidden_size, hidden_size, std, tensor_group)

        self.query, self.key, self.value = column(), column(), column()
        self.query_global = column()
        if tensor_group is None:
            self.key_global: nn.Module = plain_linear(hidden_size, hidden_size, std, GlobalKey)
            self.value_global: nn.Module = plain_linear(hidden_size, hidden_size, std, GlobalValue)
        else:
            self.key_global, self.value_global = column(), column()
        self.output = row_linear(hidden_size, hidden_size, std, tensor_group)

    def forward(
        self, hidden: Float[Tensor, "b n e"], shard: SequenceShard, step: DropoutStep | None
    ) -> Float[Tensor, "b n e"]:
        """Attend.

        Args:
            hidden: [B, n, E] this rank's rows of the sequence.
            shard: What the sequence is and which rows are here.
            step: Names the dropout masks; None drops nothing.

        Returns:
            [B, n, E] after the output projection; rows of padding see zeros from the attention.
        """
        # The same calls on every rank and in every step, whoever holds a global token: ZeRO
        # follows the order of the graph.
        globals_ = gather_global_rows(hidden, shard)  # [B, G, E]
        sites = self._dropout_sites(step)
        query, key, value = (self._heads(f(hidden)) for f in (self.query, self.key, self.value))
        heads = range(self.first_head, self.first_head + self.spec.num_heads)
        global_rows = answer_global_rows(
            self._heads(self.query_global(globals_)),
            hidden,
            self.key_global,
            self.value_global,
            global_attention(shard, sites, heads),
        )
        attended = sharded_band(
            query,
            key,
            value,
            global_rows,
            self.spec,
            shard,
            dropout=sites,
            first_head=self.first_head,
        )
        output: Tensor = self.output(attended.flatten(2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.spec.num_heads, self.head_dim)  # [B, N, H, D]

    def _dropout_sites(self, step: DropoutStep | None) -> AttentionDropoutSites | None:
        if step is None or self.dropout == 0.0:
            return None
        return AttentionDropoutSites(
            band=DropoutSite(self.dropout, step.key(self.layer, Site.BAND_ATTENTION)),
            global_rows=DropoutSite(self.dropout, step.key(self.layer, Site.GLOBAL_ATTENTION)),
        )
