"""The recipe schema: YAML -> frozen pydantic models, every fault reported at once.

Sizes are in tokens, rows or bytes as named; windows are two-sided (Longformer section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from haloformer.configs.models import (
    AnyModelConfig,
    CharLmConfig,
    ChoicesConfig,
    ClassifierConfig,
    CorefConfig,
    EncoderConfig,
    LedConfig,
    ModelConfig,
    PositiveInt,
    Probability,
    QuestionsConfig,
    Section,
)
from haloformer.configs.phases import (
    SECTIONS,
    EndLearningRate,
    LearningRate,
    Name,
    PhaseConfig,
    Schedule,
    SeqLen,
    fault_of_steps,
    faults_of_phase,
    sum_steps,
)

# The models are a part of the schema: whoever needs a section need not know its file.
__all__ = [
    "AnyModelConfig",
    "CharLmConfig",
    "ChoicesConfig",
    "ClassifierConfig",
    "CorefConfig",
    "EncoderConfig",
    "LedConfig",
    "ModelConfig",
    "Phase",
    "PhaseConfig",
    "QuestionsConfig",
    "TrainConfig",
]


def _kind_of_train(value: Any) -> str | None:
    if isinstance(value, str):
        return "path"
    return "corpora" if isinstance(value, list | tuple) and value else None


class CacheConfig(Section):
    """Blocks of remote data on this host's disk; all ranks of a host share them.

    ``path`` is a folder that holds nothing else; None is ``~/.cache/haloformer/blocks``.
    """

    path: str | None = None
    limit_mib: Annotated[int, Field(ge=64)] = 10240


class CorpusConfig(Section):
    """One of several training sets, and its share of the sequences among all weights."""

    path: str
    weight: Annotated[float, Field(gt=0.0)]


class DataConfig(Section):
    """What is read, and how tokens become training sequences.

    For pairs (led) ``seq_len`` and ``target_len`` are the most tokens of source and target, with
    <s> and </s>; longer ones are cut, and the trainer counts them.

    ``train`` is one data set or several with weights. ``prefetch`` batches are made ahead, in the
    background, each by ``workers`` threads; neither changes a batch.
    """

    train: Annotated[
        Annotated[str, Tag("path")] | Annotated[tuple[CorpusConfig, ...], Tag("corpora")],
        Discriminator(
            _kind_of_train,
            custom_error_type="no_corpus",
            custom_error_message="give a folder, or a list such as [{path: DIR, weight: 1}]",
        ),
    ]
    eval: str
    seq_len: SeqLen
    target_len: Annotated[int, Field(ge=3)] | None = None
    shuffle_block: PositiveInt = 1
    isolate_documents: bool = False
    global_tokens: Literal["first", "none"] = "first"
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    on_corrupt: Literal["stop", "skip"] = "stop"
    cache: CacheConfig = CacheConfig()
    prefetch: Annotated[int, Field(ge=0)] = 2
    workers: PositiveInt = 1

    @property
    def corpora(self) -> tuple[CorpusConfig, ...]:
        """The training sets; a single one has weight 1."""
        if isinstance(self.train, str):
            return (CorpusConfig(path=self.train, weight=1.0),)
        return self.train


class BatchConfig(Section):
    """Sequences per optimizer step, over all ranks, and per forward pass of one rank."""

    global_batch: PositiveInt
    micro_batch: PositiveInt = 1


class OptimConfig(Section):
    """AdamW, and a learning rate that is a pure function of the step.

    ``head_learning_rate`` is the peak of what stands on a Longformer's encoder, which is new where
    the encoder is trained already (Longformer, appendix, coreference); its course is the same.
    """

    learning_rate: LearningRate
    head_learning_rate: LearningRate | None = None
    end_learning_rate: EndLearningRate = 0.0
    schedule: Schedule = "linear"
    power: Annotated[float, Field(gt=0.0)] = 3.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0


class ParallelConfig(Section):
    """How ranks share the work: context (sequence) x tensor, the rest is data parallel.

    ``collective_timeout``: seconds after which a rank that waits for others in a collective gives
    up. A peer that died or a host that does not answer is noticed long before, by the launcher.
    """

    context: PositiveInt = 1
    tensor: PositiveInt = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    collective_timeout: Annotated[float, Field(ge=10.0)] = 600.0

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 needs fp32 master weights, which zero_stage 0 does not keep; "
                "set zero_stage 1"
            )
        return self


class CheckpointConfig(Section):
    """When a checkpoint is written and which ones stay.

    ``patience``: seconds for which the last checkpoint of a run is tried again when it fails.
    """

    every: PositiveInt
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    patience: Annotated[float, Field(ge=0.0)] = 600.0


class EvalConfig(Section):
    """Held-out evaluation: every so many steps, and at the first and last step."""

    every: PositiveInt | None = None
    batches: PositiveInt = 4


class TrackingConfig(Section):
    """MLflow. The default is an embedded database and artifact folder below ``runs``.

    ``log_model``: at the end put the weights into the run as an MLflow model that transformers
    loads, beside the checkpoints that only haloformer reads.
    """

    experiment: str = "haloformer"
    uri: str | None = None
    artifacts: str | None = None
    log_every: PositiveInt = 1
    log_model: bool = True


class TrainConfig(Section):
    """A whole recipe.

    ``steps`` of a recipe with ``phases`` is their sum and may be left out. ``init_from`` is a
    folder of transformers whose weights the run starts from; without one they are random.
    """

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: PositiveInt
    phases: tuple[PhaseConfig, ...] = ()
    init_from: str | None = None
    model: AnyModelConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    def phase_at(self, step: int) -> Phase:
        """The phase of a step, counted from 0; behind the end it is the last."""
        phases = self.all_phases()
        return next((phase for phase in phases if step < phase.end_step), phases[-1])

    def all_phases(self) -> list[Phase]:
        """The phases in order; a recipe without any is one phase."""
        if not self.phases:
            return [Phase(0, self.name, 0, self)]
        recipe, phases, first = self.model_dump(), [], 0
        for number, phase in enumerate(self.phases):
            name = f"phase-{number}" if phase.name is None else phase.name
            config = TrainConfig.model_validate(phase.laid_over(recipe))
            phases.append(Phase(number, name, first, config))
            first += phase.steps
        return phases

    @model_validator(mode="before")
    @classmethod
    def _fill_steps(cls, raw: Any) -> Any:
        return sum_steps(raw)

    @model_validator(mode="after")
    def _check_data_for_model(self) -> TrainConfig:
        kind, reads, data = self.model.kind, self.model.reads, self.data
        faults = []
        if reads == "pairs" and data.target_len is None:
            faults.append(f"data.target_len is missing; a {kind} needs it, such as target_len: 512")
        if reads != "pairs" and data.target_len is not None:
            what = "text" if reads == "documents" else reads
            faults.append(f"data.target_len is for pairs; a {kind} reads {what}, remove it")
        if reads in ("documents", "pairs") and self.optim.head_learning_rate is not None:
            faults.append(
                "optim.head_learning_rate is for a head that finetuning puts on an encoder; "
                f"a {kind} has none, remove it"
            )
        if reads != "documents" and data.isolate_documents:
            faults.append(
                f"data.isolate_documents is for packed text; a {kind} reads {reads}, remove it"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _check_phases(self) -> TrainConfig:
        fault = fault_of_steps(self.steps, self.phases)
        faults = [] if fault is None else [fault]
        for number, phase in enumerate(self.phases):
            try:
                TrainConfig.model_validate(phase.laid_over(self.model_dump()))
            except ValidationError as error:
                faults += faults_of_phase(phase, number, self.model.kind, error)
        if faults:
            raise ValueError("; ".join(dict.fromkeys(faults)))
        return self


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        number: From 0.
        name: For people.
        first_step: Steps of the run before it.
        config: Its recipe, itself without phases: ``config.steps`` are the steps of the phase.
    """

    number: int
    name: str
    first_step: int
    config: TrainConfig

    def settings(self) -> dict[str, Any]:
        """What a phase may set, as it is in this one, by the keys of a recipe."""
        recipe = self.config.model_dump(mode="json")
        return {"steps": self.config.steps} | {
            f"{section}.{key}": recipe[section][key]
            for key, section in SECTIONS.items()
            if key in recipe[section]  # an LED has no dilation
        }

    @property
    def end_step(self) -> int:
        """The first step behind it."""
        return self.first_step + self.config.steps
