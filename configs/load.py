"""Recipe file + command-line overrides -> one frozen TrainConfig, or one error with every fault."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from yaml.error import MarkedYAMLError

from haloformer.configs.models import MODEL_CONFIGS, LedConfig
from haloformer.configs.schema import PhaseConfig, TrainConfig

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """The recipe cannot be used; the message names every fault and what to do."""


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: YAML itself drops the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        # What is no text cannot be a key, and is refused when the mapping is built.
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise MarkedYAMLError(
                    problem=f"the key {key.value} stands twice; make one of the two",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return node


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and apply ``section.key=value`` overrides.

    Args:
        recipe: Path of a YAML file, or the bare name of a recipe that ships with haloformer. Its
            key ``base`` names another recipe, by a bare name or a path from this file, whose values
            hold where this one says nothing.
        overrides: Such as ``optim.learning_rate=1e-4``; values are YAML.

    Returns:
        The checked recipe, frozen; every key that was left out has its default.

    Raises:
        ConfigError: Naming the file and every fault in it.
    """
    path = find_recipe(recipe)
    raw = _read(path, ())
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, str(path))


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe laid over its base; ``above`` are the recipes that it is the base of."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: a recipe cannot be its own base; remove the key base")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, not {type(raw).__name__}")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(
            f"{path}: base {base!r} is no name of a recipe; give the name of one that ships with "
            "haloformer, or a path from this file"
        )
    beside = path.parent / base
    found = beside if beside.is_file() else find_recipe(base)
    return _laid_over(_read(found, (*above, path.resolve())), raw)


def _laid_over(base: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a value or a list replaces the base's."""
    merged = dict(base)
    for key, value in raw.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _laid_over(below, value)
        merged[key] = value
    return merged


def parse_config(raw: dict[str, Any], origin: str) -> TrainConfig:
    """Validate a mapping; every fault goes into one message.

    Raises:
        ConfigError: Naming ``origin`` and every fault.
    """
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(_describe(fault) for fault in error.errors())
        raise ConfigError(f"{origin}: {faults}") from error


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by the name of one that ships with haloformer.

    Raises:
        ConfigError: If there is no such file; names the recipes that exist.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = RECIPES / f"{recipe}.yaml"
    if path.name == str(recipe) and shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise ConfigError(f"{recipe}: no such recipe file; shipped recipes are: {known}")


def config_hash(config: TrainConfig) -> str:
    """sha256 of the canonical JSON of a config."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_world(config: TrainConfig, world_size: int) -> int:
    """Check that a number of ranks can run this recipe, every phase of it.

    Args:
        config: The recipe.
        world_size: Number of ranks.

    Returns:
        The data-parallel size.

    Raises:
        ConfigError: Naming every number that does not fit and what would.
    """
    parallel = config.parallel
    model_ranks = parallel.context * parallel.tensor
    data = max(world_size // model_ranks, 1)
    faults = []
    if world_size < 1 or world_size % model_ranks:
        faults.append(
            f"--ranks {world_size} is not a multiple of parallel.context {parallel.context} x "
            f"parallel.tensor {parallel.tensor} = {model_ranks}; use --ranks {model_ranks}"
        )
    faults += _split_faults(config)
    for phase in config.all_phases():
        found = [*_batch_faults(phase.config, data), *_position_faults(phase.config)]
        if config.phases:
            found = [config.phases[phase.number].blamed(fault, phase.number) for fault in found]
        faults += found
    if faults:
        # What several phases take from the recipe is told once.
        raise ConfigError(f"{config.name}: " + "; ".join(dict.fromkeys(faults)))
    return data


def _batch_faults(config: TrainConfig, data: int) -> list[str]:
    """A batch that the data-parallel ranks do not divide; rows too few for the context ranks."""
    parallel, batch, length = config.parallel, config.batch, config.data.seq_len
    faults = []
    if parallel.context > length:
        faults.append(
            f"parallel.context {parallel.context} is more than data.seq_len {length}: every "
            "rank needs at least one row; lower parallel.context"
        )
    together = batch.micro_batch * data
    if batch.global_batch % together:
        above = -(-batch.global_batch // together) * together
        faults.append(
            f"batch.global_batch {batch.global_batch} is not a multiple of batch.micro_batch "
            f"{batch.micro_batch} x {data} data-parallel ranks = {together}; take {above}, say, or "
            "another micro_batch or --ranks"
        )
    return faults


def _split_faults(config: TrainConfig) -> list[str]:
    """Heads and features that the tensor ranks do not divide; the vocabulary is padded."""
    model, tensor = config.model, config.parallel.tensor
    names = ["num_heads", "ffn_size"]
    if isinstance(model, LedConfig):
        names = [
            f"{half}_{size}" for half in ("encoder", "decoder") for size in ("heads", "ffn_size")
        ]
    sizes = {name: getattr(model, name) for name in names}
    return [
        f"parallel.tensor {tensor} does not divide model.{name} {size}; set parallel.tensor "
        f"{math.gcd(*sizes.values(), tensor)}, or a multiple of {tensor} as model.{name}"
        for name, size in sizes.items()
        if size % tensor
    ]


def _position_faults(config: TrainConfig) -> list[str]:
    """Sequences, padded for the context ranks, that are longer than the model's positions."""
    model, data, context = config.model, config.data, config.parallel.context
    if isinstance(model, LedConfig):
        longest = ("max_source_positions", model.max_source_positions)
    else:
        longest = ("max_positions", model.max_positions)
    lengths = [("seq_len", data.seq_len, *longest)]
    if isinstance(model, LedConfig):
        assert data.target_len is not None, "checked with the recipe"
        target = ("max_target_positions", model.max_target_positions)
        lengths.append(("target_len", data.target_len, *target))
    faults = []
    for name, length, limit_name, limit in lengths:
        padded = -(-length // context) * context
        if padded > limit:
            faults.append(
                f"data.{name} {length} (padded to {padded} for {context} context ranks) is more "
                f"than model.{limit_name} {limit}; lower data.{name}"
            )
    return faults


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"{override!r} is not an override; write section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {_one_line(error)}") from error
    # YAML 1.1 reads 1e-4 (no dot) as a string; people mean the number.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    *sections, key = dotted.split(".")
    target: Any = raw
    for section in sections:
        target = _go_into(target, section, override)
    if isinstance(target, list):
        target[_number_in(target, key, override)] = value
    else:
        target[key] = value


def _go_into(target: Any, section: str, override: str) -> Any:
    """The section of a section, or an entry of a list such as phases.2."""
    if isinstance(target, list):
        inner = target[_number_in(target, section, override)]
    else:
        inner = target.setdefault(section, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{override!r}: {section} is a value, not a section")
    return inner


def _number_in(entries: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(entries):
        raise ConfigError(
            f"{override!r}: {text} is no entry of a list of {len(entries)}; they count from 0"
        )
    return int(text)


def _describe(fault: Any) -> str:
    location = _location(fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _keys_at(fault["loc"][:-1]), n=1)
        hint = f" ({near[0]}?)" if near else ""
        return f"{location}: unknown key{hint}"
    if fault["type"] == "missing":
        return f"{location}: missing key; add it"
    if fault["type"] == "unknown_kind":
        return f"{location}.kind: {fault['msg']}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    shown = "" if fault["type"] == "value_error" else f" (got {fault['input']!r})"
    return f"{location}: {message}{shown}" if location else f"{message}{shown}"


def _location(loc: tuple[str | int, ...]) -> str:
    """A key as it stands in a recipe, such as phases[1].seq_len."""
    # Where a section has several forms (model, data.train) pydantic names the form as well.
    if loc[:1] == ("model",) and loc[1:2] and loc[1] in MODEL_CONFIGS:
        loc = loc[:1] + loc[2:]
    elif loc[:2] == ("data", "train"):
        loc = loc[:2] + loc[3:]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".")


def _keys_at(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = TrainConfig
    if location[:1] == ("model",):
        return list(MODEL_CONFIGS[location[1]].model_fields)
    if location[:1] == ("phases",):
        return list(PhaseConfig.model_fields)
    for part in location:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
