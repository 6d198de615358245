"""The recipe schema: YAML -> frozen pydantic models, every fault reported at once.

Sizes are in tokens, rows or bytes as named; windows are two-sided (Longformer section 3.1).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Recompute = Literal["none", "selective", "full"]


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """Longformer encoder with a masked-language-model head (post-LN, RoBERTa layout)."""

    kind: Literal["longformer_mlm"] = "longformer_mlm"
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

    def window_of_layer(self, layer: int) -> int:
        """Two-sided window of one layer."""
        window = self.attention_window
        return window if isinstance(window, int) else window[layer]

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        faults = []
        if self.hidden_size % self.num_heads:
            faults.append(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        windows = self.attention_window
        if isinstance(windows, list) and len(windows) != self.num_layers:
            faults.append(
                f"attention_window has {len(windows)} entries for {self.num_layers} layers; "
                "give one number or one per layer"
            )
        odd = [w for w in ([windows] if isinstance(windows, int) else windows) if w % 2]
        if odd:
            faults.append(f"attention_window {odd[0]} is odd; it counts both sides, make it even")
        if isinstance(self.dilation, list) and len(self.dilation) != self.num_heads:
            faults.append(
                f"dilation has {len(self.dilation)} entries for {self.num_heads} heads; "
                "give one number or one per head"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


class LedConfig(Section):
    """LED: Longformer encoder, full decoder (BART layout, post-LN), tied embeddings."""

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
        self.encoder_section()  # checks heads and windows
        if self.hidden_size % self.decoder_heads:
            raise ValueError(
                f"decoder_heads {self.decoder_heads} does not divide hidden_size {self.hidden_size}"
            )
        return self


class CharLmConfig(Section):
    """Causal character model (Longformer section 4): pre-LN, rotary positions.

    The window counts both sides as everywhere, so a causal head sees half of it, to the left.
    """

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
        faults = []
        for name, values in (
            ("attention_window", self.attention_window),
            ("dilation", self.dilation),
        ):
            if isinstance(values, list) and len(values) != self.num_layers:
                faults.append(f"{name} has {len(values)} entries for {self.num_layers} layers")
        windows = self.attention_window
        odd = [w for w in ([windows] if isinstance(windows, int) else windows) if w % 2]
        if odd:
            faults.append(f"attention_window {odd[0]} is odd; it counts both sides, make it even")
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


class DataConfig(Section):
    """What is read, and how tokens become training sequences."""

    train: str
    eval: str
    seq_len: Annotated[int, Field(ge=8)]
    shuffle_block: PositiveInt = 1
    isolate_documents: bool = False
    global_tokens: Literal["first", "none"] = "first"
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    on_corrupt: Literal["stop", "skip"] = "stop"


class BatchConfig(Section):
    """Sequences per optimizer step, over all ranks, and per forward pass of one rank."""

    global_batch: PositiveInt
    micro_batch: PositiveInt = 1


class OptimConfig(Section):
    """AdamW, and a learning rate that is a pure function of the step."""

    learning_rate: Annotated[float, Field(gt=0.0)]
    end_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["constant", "linear", "polynomial"] = "linear"
    power: Annotated[float, Field(gt=0.0)] = 3.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0


class ParallelConfig(Section):
    """How ranks share the work: context (sequence) x tensor, the rest is data parallel."""

    context: PositiveInt = 1
    tensor: PositiveInt = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 needs fp32 master weights, which zero_stage 0 does not keep; "
                "set zero_stage 1"
            )
        if self.tensor != 1:
            raise ValueError(f"tensor {self.tensor}: tensor parallelism is not there yet; set 1")
        return self


class CheckpointConfig(Section):
    """When a checkpoint is written and which ones stay."""

    every: PositiveInt
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None


class EvalConfig(Section):
    """Held-out evaluation: every so many steps, and at the first and last step."""

    every: PositiveInt | None = None
    batches: PositiveInt = 4


class TrackingConfig(Section):
    """MLflow. The default is an embedded database and artifact folder below ``runs``."""

    experiment: str = "haloformer"
    uri: str | None = None
    artifacts: str | None = None
    log_every: PositiveInt = 1


class TrainConfig(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: PositiveInt
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
