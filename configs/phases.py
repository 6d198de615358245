"""Phases of a run: what changes at which step (staged training, Longformer section 4.2.1).

steps      0 ......... 99 | 100 ..... 149 | 150 ..... 169
phase      0              | 1             | 2
seq_len    2048           | 4096          | 8192
window     32             | 64            | 128
rate       2.5e-4         | 1.25e-4       | 6.25e-5
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from haloformer.configs.models import PositiveInt, Section

SeqLen = Annotated[int, Field(ge=8)]
LearningRate = Annotated[float, Field(gt=0.0)]
EndLearningRate = Annotated[float, Field(ge=0.0)]
Schedule = Literal["constant", "linear", "polynomial"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

# A key of a phase, and the section of the recipe whose key of that name it replaces.
SECTIONS = {
    "seq_len": "data",
    "attention_window": "model",
    "dilation": "model",
    "learning_rate": "optim",
    "end_learning_rate": "optim",
    "schedule": "optim",
    "warmup_steps": "optim",
    "global_batch": "batch",
    "micro_batch": "batch",
}


class PhaseConfig(Section):
    """So many steps with settings of their own; what is left out is as the recipe's sections say.

    The learning rate, warm-up included, runs over the steps of the phase. ``name`` is what MLflow
    shows; without one a phase is called by its number.
    """

    steps: PositiveInt
    name: Name | None = None
    seq_len: SeqLen | None = None
    attention_window: PositiveInt | list[PositiveInt] | None = None
    dilation: PositiveInt | list[PositiveInt] | None = None
    learning_rate: LearningRate | None = None
    end_learning_rate: EndLearningRate | None = None
    schedule: Schedule | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    global_batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None

    def own(self) -> dict[str, Any]:
        """The keys that replace something in the recipe, with their values."""
        keys = {key: getattr(self, key) for key in SECTIONS}
        return {key: value for key, value in keys.items() if value is not None}

    def laid_over(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A recipe, as a mapping, that is this phase alone: without phases, with its steps."""
        whole = {**recipe, "phases": (), "steps": self.steps}
        for key, value in self.own().items():
            section = SECTIONS[key]
            whole[section] = {**whole[section], key: value}
        return whole

    def blamed(self, fault: str, number: int) -> str:
        """A fault of the phase's recipe by the keys that the user wrote.

        ``data.seq_len 99 is ...`` becomes ``phases[2].seq_len 99 is ...`` if the phase sets it.
        """
        for key in self.own():
            named = rf"(?<![\w.\]])(?:{SECTIONS[key]}\.)?{key}\b"
            fault = re.sub(named, f"phases[{number}].{key}", fault)
        return fault


def sum_steps(raw: Any) -> Any:
    """A recipe, as read from YAML, with ``steps`` from its phases if it leaves them out."""
    if not isinstance(raw, dict) or "steps" in raw:
        return raw
    phases = raw.get("phases")
    if not isinstance(phases, list | tuple) or not phases:
        return raw
    steps = [phase.get("steps") for phase in phases if isinstance(phase, dict)]
    # What is no number is named as a fault of its phase.
    return {**raw, "steps": max(sum(step for step in steps if isinstance(step, int)), 1)}


def fault_of_steps(steps: int, phases: Sequence[PhaseConfig]) -> str | None:
    """What is wrong with a recipe's ``steps`` beside its phases, None if nothing is."""
    total = sum(phase.steps for phase in phases)
    if not phases or steps == total:
        return None
    parts = " + ".join(str(phase.steps) for phase in phases)
    return (
        f"steps {steps} is not what the phases take, {parts} = {total}; leave steps out, or "
        "change the steps of a phase"
    )


def faults_of_phase(
    phase: PhaseConfig, number: int, kind: str, error: ValidationError
) -> list[str]:
    """Why a phase's recipe cannot be trained, one message per fault."""
    faults = []
    for fault in error.errors():
        if fault["type"] == "extra_forbidden":
            faults.append(f"phases[{number}].{fault['loc'][-1]}: a {kind} has none; remove it")
        else:
            text = str(fault["msg"]).removeprefix("Value error, ")
            faults.append(phase.blamed(text, number))
    return faults
