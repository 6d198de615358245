"""From a run to its model, in this process alone: weights, recipe, tokenizer.

    trained = load_run("latest")
    trained.model(input_ids, attention_mask).logits

The model is a plain torch module under transformers' call; nothing is sharded and no process
group is made, whatever layout the run was trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from haloformer.configs.models import MODEL_CONFIGS, CharLmConfig
from haloformer.configs.schema import LedConfig, TrackingConfig, TrainConfig
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.remote import split_address
from haloformer.data_pipeline.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer
from haloformer.launcher import tracking
from haloformer.launcher.catalog import Catalog, folder_of
from haloformer.launcher.known_runs import RUNS, KnownRun, find_runs
from haloformer.launcher.manifest import Manifest
from haloformer.launcher.run_page import LABELS, TOKENIZER
from haloformer.model.convert import PlainTrained, plain_from_config
from haloformer.model.hf_config import TokenIds


@dataclass(frozen=True)
class Found:
    """A committed checkpoint, and where it is."""

    known: KnownRun
    catalog: Catalog
    manifest: Manifest

    def train_config(self) -> TrainConfig:
        """The recipe it was trained with, of several phases that of the newest."""
        return self.manifest.train_config().phase_at(max(self.manifest.step - 1, 0)).config


@dataclass(frozen=True)
class TrainedModel:
    """A model of a run.

    Attributes:
        model: fp32, on the CPU, in eval mode.
        config: The run's recipe.
        tokenizer: The one that made the run's data.
        run_id: The run.
        step: Optimizer steps it was trained for.
    """

    model: PlainTrained
    config: TrainConfig
    tokenizer: Tokenizer
    run_id: str
    step: int

    @property
    def longest_input(self) -> int:
        """Tokens that the model can read at once."""
        model = self.config.model
        return model.max_source_positions if isinstance(model, LedConfig) else model.max_positions


def load_run(
    run: str,
    step: int | None = None,
    *,
    experiment: str | None = None,
    data: Path | str | None = None,
) -> TrainedModel:
    """Load the newest committed checkpoint of a run whose files are as they were written.

    Args:
        run: Its id, or ``latest``.
        step: The checkpoint of this step instead; damaged files are then an error.
        experiment: Where ``latest`` is looked for; None is the default experiment.
        data: The run's training data, for a tokenizer that is not among the run's artifacts;
            None is where it was.

    Returns:
        The model in plain torch, with its recipe and tokenizer.

    Raises:
        ValueError: If there is no such run or checkpoint, it is damaged, its tokenizer is not
            there, or the model is one that has no plain form.
    """
    return load_found(find_checkpoint(run, step, experiment), data)


def find_checkpoint(run: str, step: int | None, experiment: str | None) -> Found:
    """The checkpoint that ``load_run`` would load, verified; nothing is loaded yet.

    Raises:
        ValueError: If there is none, or the one that is named is damaged.
    """
    uri = tracking.tracking_uri(TrackingConfig(), os.environ.get("MLFLOW_TRACKING_URI"))
    where = TrackingConfig().experiment if experiment is None else experiment
    for known in find_runs(run, TrackingConfig(experiment=where), uri):
        run_id, catalog = known.run_id, Catalog(known.artifacts(), known.run_id)
        if step is not None and catalog.committed():
            manifest = catalog.find(step)
            fault = catalog.verify(manifest)
            if fault is not None:
                raise ValueError(
                    f"checkpoint step {step} of run {run_id} is damaged: {fault}; leave out "
                    "--step to take the newest that is whole"
                )
            return Found(known, catalog, manifest)
        newest = catalog.newest_valid()
        if newest is not None:
            return Found(known, catalog, newest)
    place = f"experiment {where} at {uri}" if run == "latest" else f"run {run}"
    raise ValueError(
        f"{place} has no committed checkpoint; train first, or name another run or --experiment"
    )


def load_found(found: Found, data: Path | str | None = None) -> TrainedModel:
    """Load a checkpoint that ``find_checkpoint`` found.

    Args:
        found: The checkpoint.
        data: As for ``load_run``.

    Raises:
        ValueError: As ``load_run``.
    """
    config, manifest = found.train_config(), found.manifest
    run_id = found.catalog.run_id
    if config.model.architecture is None:
        others = [kind for kind, model in MODEL_CONFIGS.items() if model.architecture is not None]
        raise ValueError(
            f"run {run_id} is a {config.model.kind}, which transformers has no model for: only "
            f"runs of {', '.join(others)} can be loaded outside of training"
        )
    assert not isinstance(config.model, CharLmConfig)
    tokenizer = tokenizer_of(found, data)
    special = tokenizer.specials
    tokens = TokenIds(bos=special.bos, pad=special.pad, eos=special.eos)
    labels = labels_of(found, data) if config.model.reads == "classification" else ()
    model = plain_from_config(config.model, tokenizer.vocab_size, tokens, labels)
    # It brings DeepSpeed along, seconds that an error above need not wait for.
    from haloformer.launcher.fragments import load_weights

    with _files_of(found) as folder:
        load_weights(model.model, folder)
    return TrainedModel(model, config, tokenizer, run_id, manifest.step)


def tokenizer_of(found: Found, data: Path | str | None = None) -> Tokenizer:
    """The tokenizer that made the data of a run.

    Args:
        found: A checkpoint of the run.
        data: As for ``load_run``.

    Raises:
        ValueError: If neither the run nor its data has it.
    """
    tokenizer = _kept_tokenizer(found) if data is None else None
    if tokenizer is None:
        config, run_id = found.train_config(), found.catalog.run_id
        tokenizer = _index_of_run(config, found.manifest, run_id, data).load_tokenizer()
    return tokenizer


def _kept_tokenizer(found: Found) -> Tokenizer | None:
    """The tokenizer among the run's artifacts, None if there is none.

    A run whose records are still on their way to the server has it in its folder.
    """
    documents = RUNS / found.known.run_id / "documents" / TOKENIZER
    if documents.is_dir():
        return load_tokenizer(documents)
    artifacts = found.catalog.artifacts
    names = artifacts.list_folder(TOKENIZER)
    if not names:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        for name in set(names) & set(TOKENIZER_FILES):
            path = artifacts.local_path(f"{TOKENIZER}/{name}")
            if path is None:
                artifacts.fetch(f"{TOKENIZER}/{name}", Path(scratch))
            else:
                shutil.copy(path, scratch)
        return load_tokenizer(Path(scratch))


def labels_of(found: Found, data: Path | str | None = None) -> tuple[str, ...]:
    """The names of the classes that a run was trained on, kept as the tokenizer is.

    Args:
        found: A checkpoint of the run.
        data: As for ``load_run``.

    Raises:
        ValueError: If neither the run nor its data has them.
    """
    text = None
    if data is None:
        kept = RUNS / found.known.run_id / "documents" / LABELS
        with contextlib.suppress(FileNotFoundError):
            if kept.is_file():
                text = kept.read_text(encoding="utf-8")
            else:
                text = found.catalog.artifacts.read_text(LABELS)
    if text is not None:
        return tuple(json.loads(text))
    return _index_of_run(found.train_config(), found.manifest, found.catalog.run_id, data).labels


def _index_of_run(
    config: TrainConfig, manifest: Manifest, run_id: str, data: Path | str | None
) -> ShardIndex:
    """The index of the data set that the run was trained on."""
    corpora = config.data.corpora
    folder = corpora[0].path if data is None else str(data)
    place = split_address(folder)
    if data is None and isinstance(place, Path) and not place.exists():
        raise ValueError(
            f"run {run_id} was trained on {folder}, which is not there (seen from {Path.cwd()}), "
            "and its tokenizer is not among the run's artifacts; say where the data is now with "
            "--data"
        )
    index = load_index(folder, config.data.cache)
    identity = manifest.state.get("identity")
    trained_on = identity.get("data_sha256") if isinstance(identity, dict) else None
    if len(corpora) == 1 and trained_on is not None and trained_on != index.sha256:
        raise ValueError(
            f"{folder}: not the data that run {run_id} was trained on (its hash is "
            f"{index.sha256[:12]}, not {str(trained_on)[:12]}); name the right folder with --data"
        )
    return index


@contextlib.contextmanager
def _files_of(found: Found) -> Iterator[Path]:
    """A folder of this machine with the files of a checkpoint; a remote store's are fetched."""
    artifacts, manifest = found.catalog.artifacts, found.manifest
    step_folder = folder_of(manifest.step)
    local = artifacts.local_path(f"{step_folder}/{manifest.folder}")
    if local is not None:
        yield local
        return
    with tempfile.TemporaryDirectory() as scratch:
        for entry in manifest.files:
            try:
                artifacts.fetch(f"{step_folder}/{entry.name}", Path(scratch))
            except (MlflowException, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{step_folder}/{entry.name} cannot be fetched ({reason}); is the artifact "
                    "store up?"
                ) from error
        yield Path(scratch)
