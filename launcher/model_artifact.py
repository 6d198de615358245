"""The final weights of a run as an MLflow model in the format of transformers.

    model/MLmodel                  what mlflow.transformers.load_model reads
          model/                   config.json, model.safetensors, tokenizer: from_pretrained
          components/tokenizer/
          requirements.txt

MLflow's own ``save_model`` asks the Hugging Face hub for a model card and a licence, for a minute
where there is no network, and wants the model loaded once more; its format is these few files.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from haloformer.configs.sizes import num_parameters
from haloformer.data_pipeline.files import check_free_disk
from haloformer.launcher.catalog import Catalog
from haloformer.launcher.known_runs import KnownRun
from haloformer.launcher.spool import Spool

FOLDER = "model"
_TRANSFORMERS = "5.23.0"  # as in pyproject's extra ``hf``

# transformers 5 has no pipeline for answers or text to text: those are loaded as components.
_TASKS = {
    "LongformerForMaskedLM": ("fill-mask", "FillMaskPipeline"),
    "LongformerForSequenceClassification": ("text-classification", "TextClassificationPipeline"),
    "LongformerForQuestionAnswering": ("question-answering", "QuestionAnsweringPipeline"),
    "LEDForConditionalGeneration": ("summarization", "SummarizationPipeline"),
}


def spool_model(known: KnownRun, folder: Path) -> str:
    """Write the model of a finished run into the run's folder, to be sent from there.

    Args:
        known: The run.
        folder: Its folder.

    Returns:
        For the user: how to load it, or why there is none.
    """
    try:
        written = _write(known, folder / FOLDER)
    except (ValueError, OSError, MlflowException) as error:  # the run itself is well
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return f"not logged: {' '.join(str(error).split())[:300]}"
    spool = Spool(folder)
    for path in written:
        spool.add_artifact(path, str(path.relative_to(folder).parent))
    return f"mlflow.transformers.load_model('runs:/{known.mlflow_id or '...'}/{FOLDER}')"


def _write(known: KnownRun, target: Path) -> list[Path]:
    """Write the model; its files."""
    catalog = Catalog(known.artifacts(), known.run_id)
    newest = catalog.newest_valid()
    if newest is None:
        raise ValueError("the run has no checkpoint that is whole")
    config = newest.train_config()
    if config.model.architecture is None:
        raise ValueError(f"transformers has no model for a {config.model.kind}")
    # They bring torch and DeepSpeed along: seconds that an answer above need not wait for.
    from haloformer.data_pipeline.tokenizer_json import write_for_transformers
    from haloformer.launcher.load_model import Found, load_found
    from haloformer.model.convert import save_pretrained

    trained = load_found(Found(known, catalog, newest))
    vocab_size = trained.model.raw_config["vocab_size"]
    check_free_disk(target, 4 * num_parameters(config.model, vocab_size))
    shutil.rmtree(target, ignore_errors=True)
    weights, tokenizer = target / "model", target / "components" / "tokenizer"
    for folder in (weights, tokenizer):
        folder.mkdir(parents=True)
    save_pretrained(trained.model, weights)
    for folder in (weights, tokenizer):
        write_for_transformers(trained.tokenizer, folder, trained.longest_input)
    requirements = [f"{name}=={_version(name)}" for name in ("mlflow", "torch", "transformers")]
    (target / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    _describe(known, trained.model.raw_config["architectures"][0], newest.step, target)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _describe(known: KnownRun, architecture: str, step: int, target: Path) -> None:
    task, pipeline = _TASKS[architecture]
    model = Model(run_id=known.mlflow_id, metadata={"haloformer_step": step})
    model.add_flavor(
        "transformers",
        transformers_version=_version("transformers"),
        code=None,
        task=task,
        instance_type=pipeline,
        pipeline_model_type=architecture,
        model_binary="model",
        source_model_name=known.recipe,
        components=["tokenizer"],
        tokenizer_type="PreTrainedTokenizerFast",
        torch_dtype="torch.float32",
    )
    if task in ("fill-mask", "text-classification"):
        pyfunc.add_to_model(model, loader_module="mlflow.transformers")
    model.save(str(target / "MLmodel"))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        assert name == "transformers", name
        return _TRANSFORMERS  # not needed to write what it reads
