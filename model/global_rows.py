"""The global rows of a Longformer layer, by whichever of two equal ways is cheaper."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from haloformer.kernels.fold import attend_folded, fold_query, folding_pays, unfold_answer
from haloformer.kernels.global_tokens import GlobalAttention, attend_globally
from haloformer.model.layers import Linear


class GlobalKey(Linear):
    """The projection ``key_global``: of the sequence, or folded into the query.

    Both are calls of the module, because ZeRO-3 brings its weights only for a call.
    """

    def forward(self, x: Tensor, fold: bool = False) -> Tensor:
        """[B, n, E] hidden states -> [B, n, E]; folding, [B, G, H, D] query -> [B, G, H, E + 1]."""
        return fold_query(x, self.weight, self.bias) if fold else super().forward(x)


class GlobalValue(Linear):
    """The projection ``value_global``: of the sequence, or of the averaged hidden states."""

    def forward(self, x: Tensor, fold: bool = False) -> Tensor:
        """[B, n, E] hidden states -> [B, n, E]; folding, [B, G, H, E + 1] -> [B, G, H, D]."""
        return unfold_answer(x, self.weight, self.bias) if fold else super().forward(x)


def answer_global_rows(
    query: Float[Tensor, "b g h d"],
    hidden: Float[Tensor, "b n e"],
    key_global: nn.Module,
    value_global: nn.Module,
    attention: GlobalAttention,
) -> Float[Tensor, "b g h d"]:
    """What the global tokens see of the whole sequence (section 3.1).

    The projections fold where they can (not under tensor parallelism, whose linears are
    megatron-core's) and where it pays. ZeRO sees one order of modules and gradients either way, so
    data-parallel ranks may hold other numbers of global slots.

    Args:
        query: [B, G, H, D], global projection of the global tokens.
        hidden: [B, n, E], this rank's rows.
        key_global: :class:`GlobalKey`, or a linear.
        value_global: :class:`GlobalValue`, or a linear.
        attention: Who may see whom.

    Returns:
        [B, G, H, D], the same on all ranks.
    """
    _, num_globals, num_heads, head_dim = query.shape
    if isinstance(key_global, GlobalKey) and folding_pays(num_globals, num_heads, hidden.shape[2]):
        answer = attend_folded(key_global(query, True), hidden, attention)
        rows: Tensor = value_global(answer, True)
        return rows

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], num_heads, head_dim)

    key, value = heads(key_global(hidden)), heads(value_global(hidden))
    return attend_globally(query, key, value, attention)
