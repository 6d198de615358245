"""From which run and which checkpoint `haloformer train --resume` goes on."""

from __future__ import annotations

from mlflow import MlflowClient

from haloformer.configs.schema import TrainConfig
from haloformer.launcher import tracking
from haloformer.launcher.catalog import Catalog

# What may differ between a run and its continuation: none of it changes what a step computes,
# but for steps, which move the learning rate of the steps to come as people want by it.
_FREE_ON_RESUME = (
    *("parallel.", "checkpoint.", "eval.", "tracking.", "steps"),
    *("batch.micro_batch", "data.on_corrupt", "data.cache.", "data.prefetch", "data.workers"),
)


def resume_point(client: MlflowClient, config: TrainConfig, wanted: str) -> tuple[str, int] | None:
    """The run to continue and the step of its newest good checkpoint.

    Args:
        client: Of the tracking server.
        config: The recipe.
        wanted: A run id; "latest" is the newest run of the recipe's name that has a checkpoint,
            "auto" the same, or None when there is none.

    Raises:
        ValueError: If there is none, or the recipe differs where a continuation must not.
    """
    if wanted in ("latest", "auto"):
        runs = tracking.runs_newest_first(client, config.tracking.experiment, config.name)
        candidates = [run.info.run_id for run in runs]
    else:
        candidates = [tracking.find_run(client, wanted).info.run_id]
    for run_id in candidates:
        newest = Catalog(client, run_id).newest_valid()
        if newest is None:
            continue
        # Through the schema: a key that is newer than the checkpoint had its default then.
        _check_same(config, newest.train_config().model_dump(mode="json"), run_id)
        if newest.step >= config.steps:
            raise ValueError(
                f"run {run_id} has already trained {newest.step} of {config.steps} steps; "
                f"raise steps to go on, such as steps={newest.step * 2}"
            )
        tracking.reopen_run(client, run_id)
        return run_id, newest.step
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
