"""The windows of a model's layers, which may change between two steps (section 4.2.1).

What a layer sees is no part of its weights: a phase with other windows goes on with the same ones.

phase 0, window 2:  . 1 1 1 . . .      phase 1, window 4:  1 1 1 1 1 . .
"""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from haloformer.configs.schema import AnyModelConfig, CharLmConfig, EncoderConfig, LedConfig
from haloformer.kernels.spec import WindowSpec
from haloformer.model.layers import tensor_share


class WindowedAttention(nn.Module):
    """An attention with a sliding window.

    Attributes:
        spec: Window and dilation of each head of this tensor-parallel rank.
        first_head: Number of the first of them.
    """

    spec: WindowSpec
    first_head: int

    def set_window(self, spec: WindowSpec, tensor_group: ProcessGroup | None) -> None:
        """See other rows from now on.

        Args:
            spec: Of all heads.
            tensor_group: The group over which they are split.
        """
        heads = tensor_share(spec.num_heads, "heads", tensor_group)
        self.spec, self.first_head = spec.select(heads), heads.start


def encoder_window(config: EncoderConfig, layer: int) -> WindowSpec:
    """Window of one layer of a Longformer, or of an LED's encoder."""
    return WindowSpec.from_two_sided(
        config.window_of_layer(layer),
        config.num_heads,
        dilation=config.dilation,
        causal=config.causal,
    )


def char_window(config: CharLmConfig, layer: int) -> WindowSpec:
    """Window of one layer of a char LM."""
    return WindowSpec.from_two_sided(
        config.window_of_layer(layer),
        config.num_heads,
        dilation=config.dilation_of_layer(layer),
        causal=True,
    )


def set_windows(model: nn.Module, config: AnyModelConfig, group: ProcessGroup | None) -> None:
    """Give every layer of a model the window and dilation of a config; weights stay.

    Args:
        model: Of any kind, built from a config of the same sizes.
        config: The model's section of a recipe.
        group: Its tensor-parallel group.
    """
    if isinstance(config, CharLmConfig):
        specs = [char_window(config, layer) for layer in range(config.num_layers)]
    else:
        section = config.encoder_section() if isinstance(config, LedConfig) else config
        specs = [encoder_window(section, layer) for layer in range(section.num_layers)]
    layers = [module for module in model.modules() if isinstance(module, WindowedAttention)]
    for layer, spec in zip(layers, specs, strict=True):
        layer.set_window(spec, group)
