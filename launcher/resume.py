"""From which run and which checkpoint `haloformer train --resume` goes on."""

from __future__ import annotations

from haloformer.configs.schema import TrainConfig
from haloformer.launcher import tracking
from haloformer.launcher.catalog import Catalog
from haloformer.launcher.known_runs import KnownRun, find_runs

# What may differ between a run and its continuation: none of it changes what a step computes,
# but for steps, which move the learning rate of the steps to come as people want by it.
_FREE_ON_RESUME = (
    *("parallel.", "checkpoint.", "eval.", "tracking.", "steps"),
    *("batch.micro_batch", "data.on_corrupt", "data.cache.", "data.prefetch", "data.workers"),
)


class AlreadyTrainedError(ValueError):
    """There is nothing left to do in a run."""


def resume_point(uri: str, config: TrainConfig, wanted: str) -> tuple[KnownRun, int] | None:
    """The run to continue and the step of its newest good checkpoint.

    Args:
        uri: Of the tracking server, which may be away when the run's folder is here.
        config: The recipe.
        wanted: A run id; "latest" is the newest run of the recipe's name that has a checkpoint,
            "auto" the same, or None when there is none.

    Raises:
        AlreadyTrainedError: If the run has come to its last step.
        ValueError: If there is none, or the recipe differs where a continuation must not.
    """
    asked = "latest" if wanted == "auto" else wanted
    for known in find_runs(asked, config.tracking, uri, config.name):
        run_id = known.run_id
        newest = Catalog(known.artifacts(), run_id).newest_valid()
        if newest is None:
            continue
        # Through the schema: a key that is newer than the checkpoint had its default then.
        _check_same(config, newest.train_config(), newest.step, run_id)
        if newest.step >= config.steps:
            raise AlreadyTrainedError(
                f"run {run_id} has already trained {newest.step} of {config.steps} steps; "
                f"take more to go on, such as {more_steps(config, newest.step)}"
            )
        return known, newest.step
    if wanted == "auto":
        return None
    raise ValueError(
        f"--resume {wanted}: no committed checkpoint found; start afresh without --resume"
    )


def more_steps(config: TrainConfig, steps: int) -> str:
    """The override that makes a recipe, or the last of its phases, longer by so many steps."""
    if not config.phases:
        return f"steps={config.steps + steps}"
    last = len(config.phases) - 1
    return f"phases.{last}.steps={config.phases[last].steps + steps}"


def _check_same(config: TrainConfig, saved: TrainConfig, step: int, run_id: str) -> None:
    """Phases that have begun stay as they were, but the last of them may take other steps.

    Phases to come may change: nothing of them has been trained.
    """
    begun = [phase for phase in saved.all_phases() if phase.first_step < step]
    phases = config.all_phases()
    changed: list[str] = []
    for then in begun:
        if then.number == len(phases):
            changed.append(f"phases[{then.number}] has begun and is not there any more")
            break
        now = phases[then.number]
        found = _differences(then.config, now.config)
        if config.phases:
            section = config.phases[then.number]
            found = [section.blamed(fault, then.number) for fault in found]
        steps = f"phases[{then.number}].steps" if config.phases else "steps"
        if then is not begun[-1] and now.end_step != then.end_step:
            found.append(f"{steps} was {then.config.steps}, is {now.config.steps}")
        if then is begun[-1] and now.end_step < step:
            found.append(f"{steps} is {now.config.steps}, and {step - now.first_step} are trained")
        changed += found
    if changed:
        raise ValueError(
            f"--resume {run_id}: the recipe has changed: {'; '.join(dict.fromkeys(changed))}; "
            "set the old values back, or start a new run without --resume"
        )


def _differences(then: TrainConfig, now: TrainConfig) -> list[str]:
    old = dict(tracking.flatten(then.model_dump(mode="json")))
    new = dict(tracking.flatten(now.model_dump(mode="json")))
    return [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
