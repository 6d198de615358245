"""``init_from``: a run that starts from the weights of a transformers folder.

The launcher checks the folder before anything is started; then every rank reads the slices that
it holds, before ZeRO divides them further:

    folder, weight [4, 6]     tensor rank 0: rows 0 1       tensor rank 1: rows 2 3
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from haloformer.configs.models import CharLmConfig, EncoderConfig, LedConfig
from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.index import ShardIndex
from haloformer.data_pipeline.tokenizer_json import tokenizer_sha256_of
from haloformer.launcher.splits import Share, share_of
from haloformer.launcher.topology import Topology
from haloformer.model.hf_config import TokenIds
from haloformer.model.hf_folder import StoredWeights, read_config
from haloformer.model.hf_names import IGNORABLE
from haloformer.model.hf_start import architecture_of, start_faults, stored_names


def check_start(config: TrainConfig, index: ShardIndex) -> None:
    """See that a recipe can start from its folder; sizes and names are looked at, no weights.

    Args:
        config: The recipe, which names a folder.
        index: Of its training data.

    Raises:
        ValueError: Naming the folder and everything that does not fit.
    """
    folder, model = _folder_of(config), _model_of(config)
    if not folder.is_dir():
        raise ValueError(
            f"init_from {folder}: no such folder (seen from {Path.cwd()}); name one of "
            "transformers, such as 'haloformer convert' or 'haloformer export' writes"
        )
    try:
        special = index.load_tokenizer().specials
        tokens = TokenIds(bos=special.bos, pad=special.pad, eos=special.eos)
        faults = start_faults(model, index.vocab_size, tokens, read_config(folder))
        theirs = tokenizer_sha256_of(folder)
    except ValidationError as error:
        said = "; ".join(
            str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors()
        )
        raise ValueError(f"init_from {folder}: config.json: {said}") from error
    except ValueError as error:
        raise ValueError(f"init_from {folder}: {error}") from error
    if theirs is not None and theirs != index.tokenizer_sha256:
        faults.append(
            f"its tokenizer ({theirs[:12]}) is not that of the data "
            f"({index.tokenizer_sha256[:12]}); prepare the data with --tokenizer {folder}"
        )
    if faults:
        raise ValueError(f"init_from {folder}: {'; '.join(faults)}")
    with StoredWeights(folder) as stored:
        stored_names(model, stored)


def load_start(model: nn.Module, config: TrainConfig, topology: Topology) -> str:
    """Fill a fresh model from the recipe's folder, before an engine is built on it.

    Args:
        model: Built by the task, the same on every data and context rank.
        config: The recipe, checked by ``check_start``.
        topology: Of the ranks; says which slices are this rank's.

    Returns:
        One line: what is new, and what of the folder has no use here.

    Raises:
        ValueError: If a tensor has another shape than config.json says.
    """
    folder, new, used = _folder_of(config), [], set()
    with StoredWeights(folder) as stored:
        body, head = stored_names(_model_of(config), stored)
        for name, parameter in model.named_parameters():
            share, theirs = share_of(parameter, topology), (body | head).get(name)
            if theirs is None or (name in head and not _same_shape(share, stored.shape(theirs))):
                new.append(name)
                continue
            _fill(parameter, share, theirs, stored)
            used.add(theirs)
        rest = stored.names - used - set(IGNORABLE)
    said = f"weights of {folder} ({architecture_of(read_config(folder))})"
    if new:
        said += f"; new, at random: {_modules(new)}"
    return said + (f"; not used: {_modules(sorted(rest))}" if rest else "")


def _same_shape(share: Share, shape: tuple[int, ...]) -> bool:
    return shape == ((share.rows, share.width) if len(shape) == 2 else (share.rows,))


def _fill(parameter: nn.Parameter, share: Share, theirs: str, stored: StoredWeights) -> None:
    """Read this rank's rows and columns; rows that only fill up a vocabulary stay as they are."""
    shape = stored.shape(theirs)
    # Of positions a folder may have more than are used.
    used = (min(share.rows, shape[0]), *shape[1:]) if "position" in theirs else shape
    if len(shape) != parameter.ndim or not _same_shape(share, used):
        raise ValueError(
            f"{stored.folder}: {theirs} has shape {list(shape)}, and {share.rows} x "
            f"{share.width} are needed; its config.json says something else than its weights"
        )
    last = min(share.first_row + parameter.shape[0], share.rows)
    slices = [slice(share.first_row, last)]
    if parameter.ndim == 2:
        slices.append(slice(share.columns.start, share.columns.stop))
    part = stored.part(theirs, *slices)
    with torch.no_grad():
        parameter[: part.shape[0]].copy_(part)


def _modules(names: Sequence[str]) -> str:
    """The modules that parameters belong to, the first few by name."""
    found = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    modules = [m for m in found if not any(m.startswith(f"{above}.") for above in found)]
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return ", ".join(modules[:3]) + more


def _folder_of(config: TrainConfig) -> Path:
    assert config.init_from is not None
    return Path(config.init_from)


def _model_of(config: TrainConfig) -> EncoderConfig | LedConfig:
    if isinstance(config.model, CharLmConfig):
        raise ValueError(
            f"init_from {config.init_from}: transformers has no char_lm to start from; leave "
            "init_from out"
        )
    return config.model
