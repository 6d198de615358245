"""Evaluations on real ranks; ``write`` and ``walk`` run in the ranks of ``dist.run_ranks``."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed

from haloformer.configs.schema import TrainConfig
from haloformer.data_pipeline.tokenizer_json import write_for_transformers
from haloformer.data_pipeline.tokenizers import ByteTokenizer
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.engine import build_engine
from haloformer.launcher.evaluate_kinds import evaluator_of
from haloformer.launcher.evaluate_pace import EvaluationStoppedError, Pace
from haloformer.launcher.evaluate_subject import open_subject
from haloformer.launcher.evaluate_worker import Order, evaluate, load_model
from haloformer.launcher.evaluators import Work
from haloformer.launcher.known_runs import KnownRun
from haloformer.launcher.run_dir import Plan
from haloformer.launcher.runtime import init_distributed
from haloformer.launcher.tasks import task_of
from haloformer.launcher.topology import Layout, build_topology, destroy_topology
from haloformer.launcher.trainer import StopRequest
from haloformer.launcher.trainer import evaluate as training_evaluates
from haloformer.model.convert import save_pretrained
from haloformer.model.hf_config import TokenIds, led_raw, longformer_raw
from haloformer.model.plain import PlainMaskedLM
from haloformer.model.plain_led import PlainLed
from task_layouts import CHAR_LM, LED

MLM = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 24,
    "max_positions": 48,
    "attention_window": [4, 12],
    "initializer_range": 0.3,
}
MODELS = {
    "longformer_mlm": MLM,
    "char_lm": {**CHAR_LM, "initializer_range": 0.4},
    "led": {**LED, "initializer_range": 0.5},
}
OPTIONS = {
    "longformer_mlm": {},
    "char_lm": {"length": 40, "stride": 8},
    "led": {"max_length": 12, "no_repeat_ngram_size": 3},
}
STEP = 3


@dataclass(frozen=True)
class Case:
    """One evaluation of one layout; ``limit`` as on the command line."""

    kind: str
    data: int = 1
    context: int = 1
    tensor: int = 1
    limit: int | None = None

    def __str__(self):
        limit = "" if self.limit is None else f"_limit{self.limit}"
        return f"{self.kind}_dp{self.data}_cp{self.context}_tp{self.tensor}{limit}"

    @property
    def world(self):
        return self.data * self.context * self.tensor


def config_of(kind, folder, context=1, tensor=1):
    place = f"{folder}/{'led' if kind == 'led' else 'char_lm'}"
    data = {"train": place, "eval": place, "seq_len": 47}
    if kind == "led":
        data["target_len"] = 15
    # The checkpoint is of the last step before the windows grow.
    phases = [{"steps": STEP}, {"steps": 2, "attention_window": [8, 24]}]
    return TrainConfig.model_validate(
        {
            "name": "evaluated",
            "phases": phases if kind == "char_lm" else [],
            "seed": 11,
            "steps": 5,
            "model": MODELS[kind],
            "data": data,
            "batch": {"global_batch": 1},
            "optim": {"learning_rate": 1e-3},
            "parallel": {"context": context, "tensor": tensor},
            "checkpoint": {"every": 1},
            "eval": {"batches": 1000},
        }
    )


def known_run(kind, folder):
    return KnownRun(
        run_id=kind.replace("_", "-"),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        experiment="haloformer",
        recipe="evaluated",
        started_ms=1,
        artifact_uri=f"{folder}/runs/{kind.replace('_', '-')}/artifacts",
        mlflow_id=None,
    )


def write(rank, world, folder):
    """A run with a committed checkpoint per kind, none of it known to MLflow.

    Returns:
        kind -> what training's own evaluation says of the weights.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    init_distributed()
    losses = {}
    for kind in MODELS:
        config, known = config_of(kind, folder), known_run(kind, folder)
        Path(known.artifact_uri).mkdir(parents=True)
        known.save(Path(known.artifact_uri).parent)
        topology = build_topology(Layout(1, 1, 1))
        task = task_of(config)
        torch.manual_seed(config.seed)
        model = task.build_model(config, ByteTokenizer.vocab_size, topology)
        engine = build_engine(model, config, topology)
        staging = Path(folder) / "staging"
        store = CheckpointStore(known.artifacts(), known.run_id, config, staging, topology)
        store.save_and_wait(engine, STEP, {}, patience=0.0)
        train, held_out = task.open_streams(config, topology)
        losses[kind] = training_evaluates(engine, task, held_out, config, topology)[0]
        train.close()
        engine.destroy()
        destroy_topology(topology)
    return losses


def walk(rank, world, cases, folder):
    """{case name: outcome} of every case of this world size."""
    os.environ["LOCAL_RANK"] = str(rank)
    init_distributed()
    return {str(case): run_case(case, folder) for case in cases}


def run_case(case, folder):
    config = config_of(case.kind, folder, case.context, case.tensor)
    topology = build_topology(Layout(case.data, case.context, case.tensor))
    given = OPTIONS[case.kind] | ({} if case.limit is None else {"limit": case.limit})
    settings = evaluator_of(config).settings(config, given)
    known = known_run(case.kind, folder)
    order = Order(None, settings)
    plan = Plan(
        known.run_id, known.tracking_uri, known.artifact_uri, {}, case.world, STEP, asdict(order)
    )
    task = task_of(config)
    model = load_model(plan, config, order, task, Path(folder) / "staging", topology)
    with Pace(topology, StopRequest(), None) as pace:
        outcome = evaluate(model, Work(config, task, topology, settings, pace))
    destroy_topology(topology)
    return asdict(outcome)


def plain_answers(rank, world, folder):
    """What the LED writes under transformers' call, without padding and without shards."""
    os.environ["LOCAL_RANK"] = "0"
    init_distributed()
    config, known = config_of("led", folder), known_run("led", folder)
    topology = build_topology(Layout(1, 1, 1))
    task = task_of(config)
    model = task.build_model(config, ByteTokenizer.vocab_size, topology)
    artifacts = ArtifactFolder(known.artifact_uri, known.tracking_uri)
    store = CheckpointStore(artifacts, known.run_id, config, Path(folder) / "staging", topology)
    store.load_weights(model, STEP)
    special = ByteTokenizer.specials
    tokens = TokenIds(bos=special.bos, pad=special.pad, eos=special.eos)
    plain = PlainLed(model, led_raw(config.model, ByteTokenizer.vocab_size, tokens)).eval()
    _, held_out = task.open_streams(config, topology)
    answers = []
    for batch in held_out:
        ids = torch.from_numpy(batch.input_ids)
        first = torch.zeros_like(ids)
        first[:, 0] = 1
        found = plain.generate(ids, None, first, max_length=12, no_repeat_ngram_size=3)
        answers.append(ByteTokenizer().decode(found[0].tolist()))
    return answers


def stopped(rank, world, folder):
    """How far each rank came when rank 1 alone is asked to stop, after its second batch."""
    os.environ["LOCAL_RANK"] = str(rank)
    init_distributed()
    config = config_of("longformer_mlm", folder)
    topology = build_topology(Layout(world, 1, 1))
    task, stop, done = task_of(config), StopRequest(), []

    def micro_batches(*arguments):
        done.append(len(done))
        if rank == 1 and len(done) == 2:
            stop.ask()
        return type(task).micro_batches(task, *arguments)

    model = task.build_model(config, ByteTokenizer.vocab_size, topology)
    halting = type("Halting", (type(task),), {"micro_batches": staticmethod(micro_batches)})()
    with Pace(topology, stop, None) as pace:
        try:
            evaluate(model, Work(config, halting, topology, {"limit": None}, pace))
        except EvaluationStoppedError:
            return len(done)
    return None


def export(rank, world, folder):
    """The Longformer's checkpoint as a transformers folder, ``folder``/hf."""
    os.environ["LOCAL_RANK"] = str(rank)
    init_distributed()
    config, known = config_of("longformer_mlm", folder), known_run("longformer_mlm", folder)
    topology = build_topology(Layout(1, 1, 1))
    model = task_of(config).build_model(config, ByteTokenizer.vocab_size, topology)
    staging = Path(folder) / "staging"
    store = CheckpointStore(known.artifacts(), known.run_id, config, staging, topology)
    store.load_weights(model, STEP)
    special = ByteTokenizer.specials
    tokens = TokenIds(bos=special.bos, pad=special.pad, eos=special.eos)
    raw = longformer_raw(config.model, ByteTokenizer.vocab_size, tokens)
    save_pretrained(PlainMaskedLM(model, raw), Path(folder) / "hf")
    write_for_transformers(ByteTokenizer(), Path(folder) / "hf", 48)
    return of_folder(f"{folder}/hf", f"{folder}/char_lm", topology)


def of_folder(name, data, topology):
    """Scores of a transformers folder on one rank."""
    subject = open_subject(name, None, None, data)
    config = subject.config
    settings = evaluator_of(config).settings(config, {})
    plan = subject.plan(config, settings, 1)
    task = task_of(config)
    model = load_model(plan, config, Order(**plan.evaluation), task, Path(name), topology)
    with Pace(topology, StopRequest(), None) as pace:
        return asdict(evaluate(model, Work(config, task, topology, settings, pace)))
