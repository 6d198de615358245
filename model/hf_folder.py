"""A transformers model folder: config.json beside one or several safetensors files.

Read and written with json and safetensors alone, so nothing in a folder is ever executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The mapping in config.json.

    Raises:
        ValueError: If there is no such file or it is not a JSON mapping.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG}; give the folder of a transformers model")
    return _read_mapping(path)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}; copy the folder again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a mapping of settings")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by its name there.

    Raises:
        ValueError: If there are no safetensors, only a pickle, or a file is damaged or missing.
    """
    files = _weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: named in {INDEX} but not there; copy the folder again")
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error}); copy the folder again") from error
    return weights


class StoredWeights:
    """The tensors of a folder, read one at a time or in part; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Open the files and read their headers.

        Raises:
            ValueError: As ``read_weights``.
        """
        self.folder = folder
        self._files: dict[str, Any] = {}
        with contextlib.ExitStack() as opened:
            for file in _weight_files(folder):
                if not file.is_file():
                    raise ValueError(f"{file}: named in {INDEX} but not there; copy it again")
                try:
                    weights = opened.enter_context(safe_open(str(file), framework="pt"))
                except SafetensorError as error:
                    raise ValueError(f"{file}: damaged ({error}); copy it again") from error
                self._files |= dict.fromkeys(weights.keys(), weights)
            self._opened = opened.pop_all()

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def names(self) -> Set[str]:
        """Of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; nothing of it is read."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def part(self, name: str, *slices: slice) -> Tensor:
        """A tensor, or these rows (and columns) of it; nothing else is read."""
        stored = self._files[name]
        part: Tensor = stored.get_slice(name)[slices] if slices else stored.get_tensor(name)
        return part


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        files = _read_mapping(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(x, str) for x in files.values()):
            raise ValueError(f"{folder / INDEX}: names no files; copy the folder again")
        return [folder / name for name in sorted(set(files.values()))]
    for pickle in PICKLES:
        if (folder / pickle).is_file():
            raise ValueError(
                f"{folder / pickle}: a pickle can run any code when it is read, so it is refused; "
                f"convert it where you trust it: {_conversion(folder)}"
            )
    raise ValueError(f"{folder}: no {WEIGHTS} and no {INDEX}; give the folder of a model")


def _conversion(folder: Path) -> str:
    raw = read_config(folder)
    named = raw.get("architectures")
    cls = named[0] if isinstance(named, list) and named else ""
    # The line is there to be run, so nothing but a name may get into it.
    if not (isinstance(cls, str) and cls.isidentifier()):
        # AI2's published Longformers name no class; AutoModel would leave their head behind.
        masked = raw.get("model_type") in ("longformer", "roberta")
        cls = "AutoModelForMaskedLM" if masked else "AutoModel"
    return (
        f'python -c "import transformers as t; '
        f"t.{cls}.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors; each file appears whole or not at all.

    Args:
        folder: Made if it is not there.
        config: Goes to config.json as it is.
        weights: By transformers' names; must not share memory.

    Raises:
        ValueError: If the folder already holds a model.
    """
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: is there already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # transformers refuses a file without this note.
    save_file(whole, folder / f"{WEIGHTS}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.part", folder / WEIGHTS)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / f"{CONFIG}.part").write_text(text, encoding="utf-8")
    os.replace(folder / f"{CONFIG}.part", folder / CONFIG)
    # safetensors makes files that nobody else may read.
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32, as config.json writes it."""
    return str(dtype).removeprefix("torch.")
