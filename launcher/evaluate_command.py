"""``haloformer evaluate``: ROUGE of a run's LED on held-out pairs, beside lead baselines."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from haloformer.configs.schema import DataConfig, LedConfig, TrackingConfig
from haloformer.data_pipeline.seq2seq import PairEvalStream
from haloformer.launcher import tracking
from haloformer.launcher.counting import CountProgress
from haloformer.launcher.rouge import (
    KINDS,
    Scorer,
    lead_of_sentences,
    lead_of_words,
    mean_rouge,
    open_scorer,
)
from haloformer.launcher.run_dir import write_json_atomically

if TYPE_CHECKING:
    from haloformer.launcher.load_model import Found, TrainedModel

# Two baselines: the usual three sentences, and about as many words as a lead of wiki_lead has.
_LEAD_SENTENCES, _LEAD_WORDS = 3, 200


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        help="score a trained LED on held-out pairs",
        description="Let a run's LED answer every source of a folder of pairs, and compare with "
        "the targets by ROUGE (F1, stemmed); beside it the first sentences of the source. The "
        "scores go into the run.",
        epilog="example: haloformer evaluate latest --data data/wiki_lead/eval --json rouge.json",
    )
    parser.add_argument("run_id", metavar="RUN_ID|latest")
    parser.add_argument(
        "--data", required=True, metavar="DIR",
        help="pairs made by prepare, not trained on; a path, http(s):// or s3://",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and answers there")
    parser.add_argument("--beams", type=int, default=1, help="hypotheses; 1 is greedy (default)")
    parser.add_argument(
        "--max-length", type=int, metavar="N",
        help="most tokens of an answer, its start token included (default: data.target_len)",
    )  # fmt: skip
    parser.add_argument(
        "--no-repeat-ngram-size", type=int, default=3, metavar="N",
        help="no N tokens in a row come twice in an answer; 0 = may (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    parser.add_argument(
        "--experiment",
        default=TrackingConfig().experiment,
        help="where to look for the latest run (default %(default)s)",
    )
    parser.set_defaults(run_command=run)


@dataclass(frozen=True)
class Answered:
    """One held-out pair and what the model wrote."""

    source: str
    target: str
    answer: str


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0."""
    # It brings torch along, seconds that a wrong word in the command need not wait for.
    from haloformer.launcher.load_model import find_checkpoint, load_found

    found = find_checkpoint(arguments.run_id, arguments.step, arguments.experiment)
    config = found.train_config()
    run_id = found.catalog.run_id
    if not isinstance(config.model, LedConfig):
        raise ValueError(
            f"run {run_id} trained a {config.model.kind}; evaluate scores led runs only, by what "
            "they write"
        )
    longest = config.model.max_target_positions
    if arguments.max_length is not None and arguments.max_length > longest:
        raise ValueError(
            f"--max-length {arguments.max_length} is more than the model's {longest} positions"
        )
    scorer = open_scorer()
    trained = load_found(found)
    pairs = _open_pairs(arguments.data, config.data, trained)
    start = time.perf_counter()
    answered = _answer_all(arguments, trained, pairs)
    seconds = time.perf_counter() - start
    scores = _score(scorer, answered)
    told = _log(found, scores)
    print(f"run {run_id}, step {trained.step}: {len(answered)} pairs of {arguments.data}")
    print(_table(scores))
    print(f"{seconds / len(answered):.1f} s per answer; {told}")
    if arguments.json is not None:
        record = {"run_id": run_id, "step": trained.step, "data": str(arguments.data)}
        pairs_json = [asdict(one) for one in answered]
        write_json_atomically(arguments.json, {**record, "scores": scores, "pairs": pairs_json})
    return 0


def _open_pairs(folder: str, data: DataConfig, trained: TrainedModel) -> PairEvalStream:
    """The pairs, cut as in training.

    Raises:
        ValueError: If the folder holds no pairs, or tokens of another tokenizer.
    """
    return PairEvalStream(
        folder,
        data,
        global_batch=1,
        data_rank=0,
        data_world=1,
        tokenizer_sha256=trained.tokenizer.sha256,
    )


def _answer_all(
    arguments: argparse.Namespace, trained: TrainedModel, pairs: PairEvalStream
) -> list[Answered]:
    import torch

    from haloformer.model.plain_led import PlainLed

    model, tokenizer = trained.model, trained.tokenizer
    assert isinstance(model, PlainLed)
    longest = arguments.max_length
    if longest is None:
        longest = trained.config.data.target_len
    has_globals = trained.config.data.global_tokens == "first"
    answered: list[Answered] = []
    with CountProgress("pairs", pairs.index.num_samples, every=5) as progress:
        for batch in pairs:
            (key,) = batch.keys
            if key is None:  # damaged, and the recipe says to skip such
                continue
            # One by one: sources differ in length, and padding costs as much as text.
            ids = torch.from_numpy(batch.input_ids)  # [1, N]
            mask = torch.zeros_like(ids)
            mask[:, 0] = int(has_globals)
            with torch.no_grad():
                found = model.generate(
                    ids,
                    None,
                    mask,
                    max_length=longest,
                    num_beams=arguments.beams,
                    no_repeat_ngram_size=arguments.no_repeat_ngram_size,
                )
            source, target = pairs.texts(key)
            answered.append(Answered(source, target, tokenizer.decode(found[0].tolist())))
            progress.show(len(answered))
    return answered


def _score(scorer: Scorer, answered: list[Answered]) -> dict[str, dict[str, float]]:
    """ROUGE of the model and of what a reader of the first lines would write."""
    targets = [one.target for one in answered]
    candidates = {
        "model": [one.answer for one in answered],
        f"first {_LEAD_SENTENCES} sentences": [
            lead_of_sentences(one.source, _LEAD_SENTENCES) for one in answered
        ],
        f"first {_LEAD_WORDS} words": [lead_of_words(one.source, _LEAD_WORDS) for one in answered],
    }
    return {
        name: {
            **mean_rouge(scorer, texts, targets),
            "words": fmean(len(text.split()) for text in texts),
        }
        for name, texts in candidates.items()
    }


def _table(scores: dict[str, dict[str, float]]) -> str:
    columns = (*KINDS, "words")
    width = max(len(name) for name in scores)
    lines = [" " * width + "".join(f"{column:>9}" for column in columns)]
    for name, values in scores.items():
        lines.append(f"{name:<{width}}" + "".join(f"{values[c]:9.2f}" for c in columns))
    return "\n".join(lines)


def _log(found: Found, scores: dict[str, dict[str, float]]) -> str:
    """Into the run, as metrics of the checkpoint's step; says whether that worked."""
    now, step = int(time.time() * 1000), found.manifest.step
    metrics = [
        Metric(f"{name.replace(' ', '_')}_{kind}", value, now, step)
        for name, values in scores.items()
        for kind, value in values.items()
    ]
    known = found.known
    if known.mlflow_id is None:
        return f"not logged: MLflow does not know the run yet (haloformer sync {known.run_id})"
    try:
        tracking.connect(known.tracking_uri).log_batch(known.mlflow_id, metrics=metrics)
    except (tracking.TrackingAwayError, MlflowException) as error:
        return f"not logged to MLflow ({' '.join(str(error).split())[:200]})"
    return "logged to MLflow"
