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
        _check_same(config, newest.train_config().model_dump(mode="json"), run_id)
        if newest.step >= config.steps:
            raise AlreadyTrainedError(
                f"run {run_id} has already trained {newest.step} of {config.steps} steps; "
                f"raise steps to go on, such as steps={newest.step * 2}"
            )
        return known, newest.step
    if wanted == "auto":
        return None
    raise ValueError(
        f"--resume {wanted}: no committed checkpoint found; start afresh without --resume"
    )


def _check_same(config: TrainConfig, saved: dict[str, object], run_id: str) -> None:
    now = dict(tracking.flatten(config.model_dump(mode="json")))
    then = dict(tracking.flatten(saved))
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"--resume {run_id}: the recipe has changed: {'; '.join(changed)}; "
            "set the old values back, or start a new run without --resume"
        )
