"""The models a recipe can name: sizes, and what follows from them.

Sizes are in tokens, rows or features as named; windows are two-sided (Longformer section 3.1).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
# Buckets of the distance of two spans, counted in kept spans: 1, 2-3, 4-7, ... (Lee et al. 2018).
NUM_DISTANCES = 8
Recompute = Literal["none", "selective", "full"]
# What a model is trained on: the content that the index of a data set names.
Reads = Literal["documents", "pairs", "classification", "questions", "choices", "coreference"]


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _window_faults(windows: int | list[int], num_layers: int) -> list[str]:
    faults = []
    if isinstance(windows, list) and len(windows) != num_layers:
        faults.append(
            f"attention_window has {len(windows)} entries for {num_layers} layers; "
            "give one number or one per layer"
        )
    odd = [w for w in ([windows] if isinstance(windows, int) else windows) if w % 2]
    if odd:
        faults.append(f"attention_window {odd[0]} is odd; it counts both sides, make it even")
    return faults


class EncoderConfig(Section):
    """Longformer encoder (post-LN, RoBERTa layout); what stands on it is the subclass's.

    Attributes:
        reads: Content of the data that it is trained on; every model section has it.
        architecture: The same model in transformers, None if it has none; likewise.
    """

    reads: ClassVar[Reads]
    architecture: ClassVar[str | None]
    kind: str
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    ffn_size: PositiveInt
    max_positions: PositiveInt
    attention_window: PositiveInt | list[PositiveInt]
    dilation: PositiveInt | list[PositiveInt] = 1
    causal: bool = False
    hidden_dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    activation_dropout: Probability = 0.0
    layer_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    type_vocab_size: PositiveInt = 1
    padding_position: Annotated[int, Field(ge=0)] = 1
    recompute: Recompute = "none"

    @property
    def num_position_rows(self) -> int:
        """Rows of the position table: those up to the padding's own are used by no token."""
        return self.max_positions + self.padding_position + 1

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.hidden_size // self.num_heads

    @property
    def longest_vector(self) -> int:
        """Most features of a bias or norm."""
        return max(self.hidden_size, self.ffn_size)

    def window_of_layer(self, layer: int) -> int:
        """Two-sided window of one layer."""
        window = self.attention_window
        return window if isinstance(window, int) else window[layer]

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        faults = []
        if self.hidden_size % self.num_heads:
            faults.append(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        faults += _window_faults(self.attention_window, self.num_layers)
        if isinstance(self.dilation, list) and len(self.dilation) != self.num_heads:
            faults.append(
                f"dilation has {len(self.dilation)} entries for {self.num_heads} heads; "
                "give one number or one per head"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


class ModelConfig(EncoderConfig):
    """Longformer encoder with a masked-language-model head."""

    reads: ClassVar[Reads] = "documents"
    architecture: ClassVar[str | None] = "LongformerForMaskedLM"
    kind: Literal["longformer_mlm"] = "longformer_mlm"


class ClassifierConfig(EncoderConfig):
    """Longformer that classifies documents; the names of the classes come with the data."""

    reads: ClassVar[Reads] = "classification"
    architecture: ClassVar[str | None] = "LongformerForSequenceClassification"
    kind: Literal["longformer_classifier"] = "longformer_classifier"


class QuestionsConfig(EncoderConfig):
    """Longformer that finds the answer to a question in a text."""

    reads: ClassVar[Reads] = "questions"
    architecture: ClassVar[str | None] = "LongformerForQuestionAnswering"
    kind: Literal["longformer_qa"] = "longformer_qa"


class ChoicesConfig(EncoderConfig):
    """Longformer that chooses one of the candidates of a question (WikiHop)."""

    reads: ClassVar[Reads] = "choices"
    architecture: ClassVar[str | None] = None
    kind: Literal["longformer_choice"] = "longformer_choice"


class CorefConfig(EncoderConfig):
    """Longformer that finds which spans of a document name the same thing.

    The defaults are those of coarse-to-fine coreference (Lee et al. 2018; Joshi et al. 2019).

    Attributes:
        max_span_width: Most tokens of a span.
        top_span_ratio: Spans kept per token of the document: a long one has more to keep.
        num_antecedents: Antecedents of a kept span that are scored finely.
    """

    reads: ClassVar[Reads] = "coreference"
    architecture: ClassVar[str | None] = None
    kind: Literal["longformer_coref"] = "longformer_coref"
    max_span_width: PositiveInt = 30
    top_span_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    num_antecedents: PositiveInt = 50


class LedConfig(Section):
    """LED: Longformer encoder, full decoder (BART layout, post-LN), tied embeddings."""

    reads: ClassVar[Reads] = "pairs"
    architecture: ClassVar[str | None] = "LEDForConditionalGeneration"
    kind: Literal["led"] = "led"
    hidden_size: PositiveInt
    encoder_layers: PositiveInt
    decoder_layers: PositiveInt
    encoder_heads: PositiveInt
    decoder_heads: PositiveInt
    encoder_ffn_size: PositiveInt
    decoder_ffn_size: PositiveInt
    max_source_positions: PositiveInt = 16384
    max_target_positions: PositiveInt = 1024
    attention_window: PositiveInt | list[PositiveInt] = 1024
    hidden_dropout: Probability = 0.1
    attention_dropout: Probability = 0.0
    activation_dropout: Probability = 0.0
    label_smoothing: Probability = 0.0
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    recompute: Recompute = "none"

    @property
    def longest_vector(self) -> int:
        """Most features of a bias or norm."""
        return max(self.hidden_size, self.encoder_ffn_size, self.decoder_ffn_size)

    def encoder_section(self) -> ModelConfig:
        """The encoder's layers as those of a Longformer, which is what they are."""
        return ModelConfig(
            hidden_size=self.hidden_size,
            num_layers=self.encoder_layers,
            num_heads=self.encoder_heads,
            ffn_size=self.encoder_ffn_size,
            max_positions=self.max_source_positions,
            attention_window=self.attention_window,
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            initializer_range=self.initializer_range,
            recompute=self.recompute,
        )

    @model_validator(mode="after")
    def _check(self) -> LedConfig:
        faults = [
            f"{name} {heads} does not divide hidden_size {self.hidden_size}"
            for name, heads in (
                ("encoder_heads", self.encoder_heads),
                ("decoder_heads", self.decoder_heads),
            )
            if self.hidden_size % heads
        ]
        faults += _window_faults(self.attention_window, self.encoder_layers)
        if faults:
            raise ValueError("; ".join(faults))
        return self


class CharLmConfig(Section):
    """Causal character model (Longformer section 4): pre-LN, rotary positions.

    The window counts both sides as everywhere, so a causal head sees half of it, to the left.
    """

    reads: ClassVar[Reads] = "documents"
    architecture: ClassVar[str | None] = None
    kind: Literal["char_lm"] = "char_lm"
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    ffn_size: PositiveInt
    max_positions: PositiveInt
    attention_window: PositiveInt | list[PositiveInt]
    dilation: PositiveInt | list[PositiveInt] = 1
    num_dilated_heads: Annotated[int, Field(ge=0)] = 2
    hidden_dropout: Probability = 0.2
    attention_dropout: Probability = 0.0
    layer_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    recompute: Recompute = "none"

    @property
    def longest_vector(self) -> int:
        """Most features of a bias or norm."""
        return max(self.hidden_size, self.ffn_size)

    def window_of_layer(self, layer: int) -> int:
        """Two-sided window of one layer."""
        window = self.attention_window
        return window if isinstance(window, int) else window[layer]

    def dilation_of_layer(self, layer: int) -> tuple[int, ...]:
        """Dilation of each head of one layer: the last ``num_dilated_heads`` are dilated."""
        per_layer = self.dilation
        dilation = per_layer if isinstance(per_layer, int) else per_layer[layer]
        plain = self.num_heads - self.num_dilated_heads
        return (1,) * plain + (dilation,) * self.num_dilated_heads

    @model_validator(mode="after")
    def _check(self) -> CharLmConfig:
        faults = _window_faults(self.attention_window, self.num_layers)
        dilation = self.dilation
        if isinstance(dilation, list) and len(dilation) != self.num_layers:
            faults.append(
                f"dilation has {len(dilation)} entries for {self.num_layers} layers; "
                "give one number or one per layer"
            )
        if self.hidden_size % (2 * self.num_heads):
            faults.append(
                f"hidden_size {self.hidden_size} is not a multiple of 2 x num_heads "
                f"{self.num_heads}, which rotary positions need"
            )
        if self.num_dilated_heads > self.num_heads:
            faults.append(
                f"num_dilated_heads {self.num_dilated_heads} is more than num_heads "
                f"{self.num_heads}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


MODEL_CONFIGS: dict[str, type[EncoderConfig | LedConfig | CharLmConfig]] = {
    "longformer_mlm": ModelConfig,
    "longformer_classifier": ClassifierConfig,
    "longformer_qa": QuestionsConfig,
    "longformer_choice": ChoicesConfig,
    "longformer_coref": CorefConfig,
    "led": LedConfig,
    "char_lm": CharLmConfig,
}


def _kind_of(value: Any) -> str:
    """The model that a section describes; a section without a kind is a Longformer's."""
    default = "longformer_mlm"
    if isinstance(value, dict):
        return str(value.get("kind", default))
    return str(getattr(value, "kind", default))


AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag("longformer_mlm")]
    | Annotated[ClassifierConfig, Tag("longformer_classifier")]
    | Annotated[QuestionsConfig, Tag("longformer_qa")]
    | Annotated[ChoicesConfig, Tag("longformer_choice")]
    | Annotated[CorefConfig, Tag("longformer_coref")]
    | Annotated[LedConfig, Tag("led")]
    | Annotated[CharLmConfig, Tag("char_lm")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message=f"there is no such kind; it is one of {', '.join(MODEL_CONFIGS)}",
    ),
]
