"""What the planner knows of a recipe: layers, parameters and rows, in plain integers.

Nothing here, nor in any other ``plan_*`` module, imports torch: a plan answers in a second, on any
machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from haloformer.configs.models import CharLmConfig, EncoderConfig, LedConfig, Recompute
from haloformer.configs.schema import AnyModelConfig, TrainConfig
from haloformer.configs.sizes import num_parameters
from haloformer.kernels.spec import WindowSpec

LayerKind = Literal["encoder", "decoder", "char"]
FP32 = 4  # bytes
# Elements that DeepSpeed reduces or fetches at once (engine._BUCKET).
BUCKET = 25_000_000


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: ``encoder`` has window, globals and a norm after each half; ``decoder`` sees all
            target rows and the encoder's; ``char`` has a causal window and norms before.
        heads: Of the layer.
        ffn: Inner features.
        spec: Window of each head; a decoder has none.
        hidden_dropout: Rate after each half.
        activation_dropout: Rate within the feed-forward half.
    """

    kind: LayerKind
    heads: int
    ffn: int
    spec: WindowSpec | None
    hidden_dropout: float
    activation_dropout: float = 0.0

    @cached_property
    def reach(self) -> int:
        """Rows to either side that the widest head needs; a plan asks for it very often."""
        return 0 if self.spec is None else self.spec.reach_left + self.spec.reach_right

    @cached_property
    def mean_band(self) -> float:
        """Keys in the window of a row away from the ends, in the mean over the heads."""
        assert self.spec is not None
        return sum(self.spec.left + self.spec.right) / self.heads + 1


@dataclass(frozen=True)
class Model:
    """A model in numbers.

    Attributes:
        kind: As recipes name it.
        hidden: Features.
        vocab: Entries of the token embedding.
        layers: In the order of the forward pass; those of a decoder come last.
        tables: Rows of the other embedding tables.
        head: Parameters of what stands on the last layer, as (elements, is it a matrix).
        vector_limit: Most features of a bias or norm.
    """

    kind: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tables: tuple[int, ...]
    head: tuple[tuple[int, bool], ...]
    vector_limit: int

    @property
    def has_decoder(self) -> bool:
        """Whether it reads pairs."""
        return self.kind == "led"

    @property
    def scores_vocabulary(self) -> bool:
        """Whether its head gives logits over the vocabulary."""
        return self.kind in ("longformer_mlm", "led", "char_lm")


@dataclass(frozen=True)
class Split:
    """How the ranks share the work, and what they keep.

    Attributes:
        data: Data-parallel size.
        context: Ranks that hold one sequence.
        tensor: Ranks that hold one layer.
        zero_stage: 0 to 3.
        recompute: What the backward computes again.
        micro_batch: Sequences per forward pass of a rank.
        width: Bytes per weight and activation: 4 for fp32, 2 for bf16.
    """

    data: int
    context: int
    tensor: int
    zero_stage: int
    recompute: Recompute
    micro_batch: int
    width: int

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.data * self.context * self.tensor

    @property
    def zero_ranks(self) -> int:
        """Ranks over which ZeRO shards."""
        return self.data * self.context


@dataclass(frozen=True)
class Rows:
    """What one rank computes on in one forward pass.

    Attributes:
        batch: Sequences B.
        source: Rows n of each sequence that are here.
        target: Decoder rows t that are here; 0 without a decoder.
        num_globals: Slots G for global tokens per sequence.
        predicted: Rows with a loss, over the batch; what is expected where they are drawn.
    """

    batch: int
    source: int
    target: int
    num_globals: int
    predicted: int


def model_of(config: AnyModelConfig, vocab: int) -> Model:
    """The numbers of a model section."""
    size = config.hidden_size
    if isinstance(config, LedConfig):
        section = config.encoder_section()
        decoder = Layer(
            "decoder",
            config.decoder_heads,
            config.decoder_ffn_size,
            None,
            config.hidden_dropout,
            config.activation_dropout,
        )
        layers = _encoder_layers(section) + (decoder,) * config.decoder_layers
        tables: tuple[int, ...] = (config.max_source_positions, config.max_target_positions)
        head: tuple[tuple[int, bool], ...] = ()
    elif isinstance(config, CharLmConfig):
        layers, tables = _char_layers(config), ()
        head = ((size, False), (size, False), (vocab, False))
    else:
        layers = _encoder_layers(config)
        tables = (config.num_position_rows, config.type_vocab_size)
        head = _encoder_head(config, vocab)
    return Model(config.kind, size, vocab, layers, tables, head, config.longest_vector)


def _encoder_layers(config: EncoderConfig) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            "encoder",
            config.num_heads,
            config.ffn_size,
            WindowSpec.from_two_sided(
                config.window_of_layer(layer),
                config.num_heads,
                dilation=config.dilation,
                causal=config.causal,
            ),
            config.hidden_dropout,
            config.activation_dropout,
        )
        for layer in range(config.num_layers)
    )


def _char_layers(config: CharLmConfig) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            "char",
            config.num_heads,
            config.ffn_size,
            WindowSpec.from_two_sided(
                config.window_of_layer(layer),
                config.num_heads,
                dilation=config.dilation_of_layer(layer),
                causal=True,
            ),
            config.hidden_dropout,
        )
        for layer in range(config.num_layers)
    )


def _encoder_head(config: EncoderConfig, vocab: int) -> tuple[tuple[int, bool], ...]:
    size = config.hidden_size
    if config.kind == "longformer_mlm":
        return ((size * size, True), *((size, False),) * 3, (vocab, False))
    # Of the heads of annotated tasks only the sum is told: they are small, and whole on every rank.
    return ((num_parameters(config, vocab) - _body(config, vocab), True),)


def _body(config: EncoderConfig, vocab: int) -> int:
    """Parameters of embeddings and layers."""
    size = config.hidden_size
    rows = vocab + config.num_position_rows + config.type_vocab_size
    layers = sum(n for layer in _encoder_layers(config) for n, _ in _layer(layer, size, 1))
    return rows * size + 2 * size + layers


def split_of(config: TrainConfig, world: int) -> Split:
    """The layout that a recipe names, on so many ranks."""
    parallel = config.parallel
    return Split(
        data=world // (parallel.context * parallel.tensor),
        context=parallel.context,
        tensor=parallel.tensor,
        zero_stage=parallel.zero_stage,
        recompute=config.model.recompute,
        micro_batch=config.batch.micro_batch,
        width=2 if parallel.precision == "bf16" else FP32,
    )


def rows_of(config: TrainConfig, split: Split, num_globals: int) -> Rows:
    """Rows of one rank in one forward pass, sequences taken as long as the recipe allows.

    Args:
        config: Of one phase.
        split: How the ranks share the work.
        num_globals: Global tokens per sequence.
    """
    data, model = config.data, config.model
    source = -(-data.seq_len // split.context)
    target = 0
    predicted = split.micro_batch * source
    if isinstance(model, LedConfig):
        assert data.target_len is not None, "checked with the recipe"
        target = -(-data.target_len // split.context)
        predicted = split.micro_batch * target
    elif model.kind == "longformer_mlm":
        predicted = split.micro_batch * round(data.mask_probability * source)
    elif not isinstance(model, CharLmConfig):
        predicted = split.micro_batch
    if isinstance(model, CharLmConfig):
        num_globals = 0  # it would see ahead
    return Rows(split.micro_batch, source, target, num_globals, predicted)


@dataclass(frozen=True)
class Part:
    """Parameters that get their gradients at the same moment: embeddings, a layer, or the head.

    Attributes:
        name: For people.
        sizes: (elements, whether it is a matrix) of each parameter on one rank.
    """

    name: str
    sizes: tuple[tuple[int, bool], ...]

    @cached_property
    def elements(self) -> int:
        """Elements in all."""
        return sum(size for size, _ in self.sizes)


def parts_of(model: Model, tensor: int) -> list[Part]:
    """The parameters of one tensor-parallel rank, in the order of the forward pass."""
    size, rows = model.hidden, math.ceil(model.vocab / tensor)
    tables: list[tuple[int, bool]] = [(rows * size, True)]
    tables += [(table * size, True) for table in model.tables]
    num_norms = {"led": 2, "char_lm": 0}.get(model.kind, 1)
    parts = [Part("embeddings", (*tables, *((size, False),) * 2 * num_norms))]
    parts += [
        Part(f"{layer.kind} {number}", tuple(_layer(layer, size, tensor)))
        for number, layer in enumerate(model.layers)
    ]
    # The bias of the vocabulary is split as its rows are; the rest of a head is whole.
    head = tuple((rows, False) if x == (model.vocab, False) else x for x in model.head)
    return [*parts, Part("head", head)]


def _layer(layer: Layer, size: int, tensor: int) -> Iterator[tuple[int, bool]]:
    columns = {"encoder": 6, "decoder": 6, "char": 3}[layer.kind]
    row_linears = {"encoder": 1, "decoder": 2, "char": 1}[layer.kind]
    norms = {"encoder": 2, "decoder": 3, "char": 2}[layer.kind]
    for outputs in (size // tensor,) * columns + (layer.ffn // tensor,):
        yield from ((size * outputs, True), (outputs, False))
    for inputs in (size // tensor,) * row_linears + (layer.ffn // tensor,):
        yield from ((size * inputs, True), (size, False))
    yield from ((size, False),) * 2 * norms
