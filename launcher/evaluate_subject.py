"""What is evaluated, a checkpoint of a run or a transformers folder, and in which layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from haloformer.configs.schema import LedConfig, ModelConfig, TrainConfig
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.reader import check_sizes
from haloformer.data_pipeline.tokenizer_json import TOKENIZER_JSON, engine_of, fast_tokenizer
from haloformer.data_pipeline.tokenizers import load_bpe
from haloformer.launcher import tracking
from haloformer.launcher.evaluators import Evaluator, Scores
from haloformer.launcher.load_model import Found, find_checkpoint, labels_of, tokenizer_of
from haloformer.launcher.run_dir import Plan
from haloformer.model.hf_config import led_config, longformer_config
from haloformer.model.hf_folder import CONFIG, read_config

# Whether its recipe can be told from config.json alone.
_ARCHITECTURES: dict[str, Callable[[dict[str, Any]], ModelConfig | LedConfig]] = {
    "LongformerForMaskedLM": longformer_config,
    "LEDForConditionalGeneration": led_config,
}


@dataclass(frozen=True)
class Subject:
    """A trained model, and held-out data that it can read.

    Attributes:
        name: For a person.
        config: The recipe of its checkpoint; ``data.eval`` is what is evaluated.
        found: The checkpoint of a run, or
        folder: a transformers folder.
    """

    name: str
    config: TrainConfig
    found: Found | None = None
    folder: Path | None = None

    def plan(self, config: TrainConfig, settings: dict[str, Any], world_size: int) -> Plan:
        """For the ranks."""
        values = config.model_dump(mode="json")
        order = {"folder": None if self.folder is None else str(self.folder), "settings": settings}
        if self.found is None:
            return Plan("", "", "", values, world_size, None, order)
        known, step = self.found.known, self.found.manifest.step
        return Plan(
            known.run_id, known.tracking_uri, known.artifact_uri, values, world_size, step, order
        )

    def identity(self) -> dict[str, Any]:
        """For the JSON file: which weights."""
        if self.found is None:
            return {"folder": str(self.folder)}
        return {"run_id": self.found.known.run_id, "step": self.found.manifest.step}

    def log(self, scores: Scores) -> str:
        """Into the run, as metrics of the checkpoint's step; says whether that worked."""
        if self.found is None:
            return "not logged: a folder has no run"
        now, step, known = int(time.time() * 1000), self.found.manifest.step, self.found.known
        metrics = [
            Metric(f"{name.replace(' ', '_')}_{metric}", value, now, step)
            for name, values in scores.items()
            for metric, value in values.items()
        ]
        if known.mlflow_id is None:
            return f"not logged: MLflow does not know the run yet (haloformer sync {known.run_id})"
        try:
            tracking.connect(known.tracking_uri).log_batch(known.mlflow_id, metrics=metrics)
        except (tracking.TrackingError, MlflowException) as error:  # the scores must not be lost
            return f"not logged to MLflow ({' '.join(str(error).split())[:200]})"
        return "logged to MLflow"


def open_subject(name: str, step: int | None, experiment: str, data: str) -> Subject:
    """Find a model, and see that it can read the data.

    Args:
        name: A run id, ``latest``, or a transformers folder.
        step: Checkpoint of a run; None is the newest.
        experiment: Where ``latest`` is looked for.
        data: Held-out data, a folder or an address.

    Raises:
        ValueError: If there is no such model, or the data is missing, damaged, of another kind
            than the model reads, or made with another tokenizer or other labels.
    """
    if (Path(name) / CONFIG).is_file():
        return _open_folder(Path(name), step, data)
    if Path(name).is_dir():
        raise ValueError(f"{name}: no {CONFIG}; name a run or the folder of a model")
    found = find_checkpoint(name, step, experiment)
    # A checkpoint is of the phase whose step wrote it.
    recipe = found.train_config().phase_at(max(found.manifest.step - 1, 0)).config
    config = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": data})})
    run_id = found.known.run_id
    index = _open_data(config)
    index.check_tokenizer(tokenizer_of(found).sha256, f"run {run_id}")
    if recipe.model.reads == "classification":
        index.check_labels(labels_of(found), f"run {run_id}")
    return Subject(f"run {run_id}, step {found.manifest.step}", config, found=found)


def _open_folder(folder: Path, step: int | None, data: str) -> Subject:
    if step is not None:
        raise ValueError(f"--step {step} is of a run, and {folder} is a folder; remove it")
    raw = read_config(folder)
    architecture = (raw.get("architectures") or ["nothing known"])[0]
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{folder}: holds {architecture}; evaluate scores {' and '.join(_ARCHITECTURES)}"
        )
    try:
        model = _ARCHITECTURES[architecture](raw)
    except ValueError as error:  # pydantic's error is one, of several lines
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error
    config = _recipe(model, data)
    index = _open_data(config)
    _check_vocabulary(folder, raw, index)
    return Subject(str(folder), config, folder=folder.resolve())


def _recipe(model: ModelConfig | LedConfig, data: str) -> TrainConfig:
    """A recipe that would train such a model on sequences as long as it can read."""
    section: dict[str, Any] = {"train": data, "eval": data}
    if isinstance(model, LedConfig):
        section["seq_len"] = model.max_source_positions
        section["target_len"] = model.max_target_positions
    else:
        section["seq_len"] = model.max_positions
    return TrainConfig.model_validate(
        {
            "name": "transformers",
            "steps": 1,
            "model": model.model_dump(),
            "data": section,
            "batch": {"global_batch": 1},
            "optim": {"learning_rate": 1.0},
            "checkpoint": {"every": 1},
        }
    )


def _open_data(config: TrainConfig) -> ShardIndex:
    data = config.data
    index = load_index(data.eval, data.cache)
    index.check_content(config.model.reads)
    if data.on_corrupt == "stop":
        check_sizes(index)
    return index


def _check_vocabulary(folder: Path, raw: dict[str, Any], index: ShardIndex) -> None:
    """See that the data's ids mean to the model what they mean to the data."""
    tokenizer = index.load_tokenizer()
    ours: dict[str, int] = fast_tokenizer(tokenizer).get_vocab()
    theirs = _vocabulary(folder)
    remedy = f"prepare the data with --tokenizer {folder}"
    different = [
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    ]
    if different:
        first = min(different, key=lambda token: ours.get(token, theirs.get(token, 0)))
        raise ValueError(
            f"{index.folder}: made with another tokenizer than {folder} has: {first!r} is token "
            f"{ours.get(first, 'none')} here and {theirs.get(first, 'none')} there; {remedy}"
        )
    special = tokenizer.specials
    wanted = {"bos_token_id": special.bos, "pad_token_id": special.pad, "eos_token_id": special.eos}
    if "decoder_start_token_id" in raw:
        wanted["decoder_start_token_id"] = special.eos
    for key, value in wanted.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"{folder}/{CONFIG}: {key} is {raw[key]}, and for the data it is {value}; {remedy}"
            )
    if raw["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(
            f"{folder}: the model has {raw['vocab_size']} tokens, its tokenizer "
            f"{tokenizer.vocab_size}; the two do not belong together"
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id, of the tokenizer beside a model."""
    engine = engine_of(folder)
    if engine is not None:
        vocabulary: dict[str, int] = engine.get_vocab()
        return vocabulary
    if (folder / "vocab.json").is_file():
        return {token: number for number, token in enumerate(load_bpe(folder).tokens)}
    raise ValueError(
        f"{folder}: no {TOKENIZER_JSON} and no vocab.json, so nobody can tell whether the data has "
        "the model's tokens; copy the tokenizer of the model there"
    )


def with_mesh(config: TrainConfig, evaluator: Evaluator, ranks: int | None) -> TrainConfig:
    """A recipe whose parallel sizes fit a number of ranks; what is left over are data ranks.

    ::

        recipe context 4 x tensor 2, 8 ranks     context 4, tensor 2, data 1
                                     4 ranks     context 2, tensor 2, data 1
                                     3 ranks     context 1, tensor 1, data 3

    The product is as large as it can be, for the recipe's sizes were chosen for memory; among
    equals the larger tensor size.

    Args:
        config: The recipe.
        evaluator: Says which axes its ranks can share a sequence on.
        ranks: Ranks in all; None keeps the recipe's sizes.

    Raises:
        ValueError: If there is no rank.
    """
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks {ranks} is less than 1")
    context = config.parallel.context if evaluator.splits_sequence else 1
    tensor = config.parallel.tensor if evaluator.splits_weights else 1
    if ranks is not None:
        sizes = [
            (c * t, t, c)
            for c in range(1, context + 1)
            for t in range(1, tensor + 1)
            if context % c == 0 and tensor % t == 0 and ranks % (c * t) == 0
        ]
        _, tensor, context = max(sizes)
    update = {"context": context, "tensor": tensor}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})
