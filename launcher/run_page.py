"""What makes the MLflow page of a run readable by a stranger: tags, description, documents.

runs/<id>/documents/config.yaml       the recipe with every default, to be trained again
                    environment.txt   every installed package with its version
                    tokenizer/        of the data, which may be gone one day
                    labels.json       its classes, if it is a classification
"""

from __future__ import annotations

import getpass
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

import haloformer
from haloformer.configs.schema import TrainConfig
from haloformer.configs.sizes import num_parameters
from haloformer.data_pipeline.index import ShardIndex
from haloformer.launcher.counting import counted
from haloformer.launcher.spool import Spool
from haloformer.launcher.tracking import PARAM_LIMIT, flatten

TOKENIZER, LABELS = "tokenizer", "labels.json"
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "mlflow", "triton")


def describe_run(
    spool: Spool,
    config: TrainConfig,
    index: ShardIndex,
    num_ranks: int,
    command: Sequence[str],
) -> None:
    """Spool parameters, tags and documents of a new run.

    Args:
        spool: Of the run.
        config: The recipe; every key becomes a searchable parameter.
        index: Of the training data, or of the first of several.
        num_ranks: In all.
        command: The words that were typed.
    """
    values = flatten(config.model_dump(mode="json"))
    spool.add_params({key: str(value)[:PARAM_LIMIT] for key, value in values})
    name = spool.folder.name
    spool.add_tags(
        {
            **_origin(command),
            "mlflow.note.content": _summary(config, index, num_ranks, name, command),
        }
    )
    documents = spool.folder / "documents"
    (documents / TOKENIZER).mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (documents / "config.yaml").write_text(text, encoding="utf-8")
    (documents / "environment.txt").write_text(_environment(), encoding="utf-8")
    index.load_tokenizer().save(documents / TOKENIZER)
    if index.labels:
        (documents / LABELS).write_text(json.dumps(index.labels), encoding="utf-8")
    for path in sorted(documents.rglob("*")):
        if path.is_file():
            spool.add_artifact(path, str(path.relative_to(documents).parent))


def _origin(command: Sequence[str]) -> dict[str, str]:
    """Who, where, with which program and versions."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": "haloformer train",
        "mlflow.source.type": "LOCAL",
        "haloformer.host": socket.gethostname(),
        "haloformer.command": shlex.join(command)[:PARAM_LIMIT],
        "haloformer.version": haloformer.__version__,
        "haloformer.python": platform.python_version(),
    }
    for library in _LIBRARIES:
        try:
            tags[f"haloformer.{library}"] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = Path(haloformer.__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        tags["haloformer.git_changed"] = str(bool(changed)).lower()
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number only
        return str(os.getuid())


def _git(folder: Path, *words: str) -> str | None:
    """What git says of the program's own folder, None if that is no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _summary(
    config: TrainConfig, index: ShardIndex, num_ranks: int, run: str, command: Sequence[str]
) -> str:
    data, parallel = config.data, config.parallel
    size = num_parameters(config.model, index.vocab_size) / 1e6
    corpora = ", ".join(f"`{corpus.path}`" for corpus in data.corpora)
    data_ranks = num_ranks // (parallel.context * parallel.tensor)
    again = shlex.join(["haloformer", "train", *_without_resume(command[2:]), "--resume", run])
    return "\n".join(
        [
            f"**{config.name}**: a {config.model.kind} of {size:.1f} M parameters, trained for "
            f"{config.steps} steps on sequences of {lengths_of(config)} tokens.",
            "",
            *_phase_table(config),
            "",
            f"- data: {corpora} ({index.num_samples} {index.content}, {index.num_tokens} tokens "
            f"in the first), held out: `{data.eval}`; tokenizer: {index.tokenizer_kind}, "
            f"{index.vocab_size} tokens",
            f"- layout: {counted(num_ranks, 'rank')} = data {data_ranks} x context "
            f"{parallel.context} x tensor {parallel.tensor}, ZeRO-{parallel.zero_stage}, "
            f"{parallel.precision}",
            f"- go on: `{again}`",
            f"- use it: `haloformer export {run} FOLDER`",
            "",
            "`loss` and `eval_loss` are in nats per target token. `config.yaml` trains it anew, "
            "`environment.txt` is what was installed, `checkpoints/` holds what can be resumed.",
        ]
    )


def lengths_of(config: TrainConfig) -> str:
    """The sequence lengths of a run as they follow each other, such as ``2048 then 4096``."""
    lengths = (phase.config.data.seq_len for phase in config.all_phases())
    return " then ".join(str(length) for length, _ in itertools.groupby(lengths))


def _phase_table(config: TrainConfig) -> list[str]:
    """Markdown: a line per phase; a run without phases has one."""
    lines = ["| phase | steps | sequences | tokens | window | learning rate |", "|" + "---|" * 6]
    for phase in config.all_phases():
        recipe = phase.config
        cells = (
            *(phase.name, recipe.steps, recipe.batch.global_batch, recipe.data.seq_len),
            *(recipe.model.attention_window, recipe.optim.learning_rate),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _without_resume(words: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != "--resume" and not word.startswith("--resume="):
            kept.append(word)
        skip = word == "--resume"
    return kept


def _environment() -> str:
    """Name and version of every installed package, as pip takes them."""
    found = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))
