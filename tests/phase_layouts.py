"""A run of several phases on every layout, by the parts that a rank of a real run is made of.

    step       0      1    | 2      3    | 4      5
    phase      0           | 1           | 2
    batch      8 x 1 row   | 4 x 1       | 4 x 2 rows at once
    length     24          | 47          | 47
    resumed         ^        ^      ^      ^      ^       from inside each phase and at each border

``walk`` runs in the ranks of ``dist.run_ranks``; checkpoints are written after every step.
"""

import json
from pathlib import Path

from haloformer.configs.schema import TrainConfig
from haloformer.launcher.exchange import gather_json
from haloformer.launcher.fragments import load_fragments, take_snapshot
from haloformer.launcher.phases import enter_phase, open_phase
from haloformer.launcher.schedule import learning_rate
from rank_steps import Rank
from task_layouts import CHAR_LM, LED, Case

STEPS = 6
DILATION = {"char_lm": [1, 3], "longformer_mlm": [1, 1, 1, 3]}  # per layer, per head
MLM = {key: value for key, value in CHAR_LM.items() if key not in ("kind", "dilation")}
MODELS = {
    "char_lm": CHAR_LM | {"dilation": 1},
    "led": LED,
    "longformer_mlm": MLM | {"kind": "longformer_mlm"},
}
# The first of a kind is what the others are held to.
CASES = [
    *(Case("char_lm", d, c, stage) for d, c, stage in [(1, 1, 1), (2, 1, 0), (1, 2, 2), (2, 1, 3)]),
    Case("char_lm", 1, 1, 3, tensor=2),
    *(Case("led", d, c, stage) for d, c, stage in [(1, 1, 0), (2, 1, 2), (1, 2, 3)]),
    *(Case("longformer_mlm", d, c, stage) for d, c, stage in [(1, 1, 3), (1, 2, 1)]),
]


def phases_of(kind):
    """The phases that the picture shows; windows grow, and dilation comes where there is one."""
    dilated = {"dilation": DILATION[kind]} if kind in DILATION else {}
    return [
        {"steps": 2, "seq_len": 24, "attention_window": 4, "global_batch": 8, "warmup_steps": 2},
        {"steps": 2, "name": "wide", "schedule": "constant", **dilated},
        {"steps": 2, "micro_batch": 2, "attention_window": [20, 8], "learning_rate": 5e-4},
    ]


def config_of(case, folder):
    place = f"{folder}/{'led' if case.kind == 'led' else 'char_lm'}"
    data = {"train": place, "eval": place, "seq_len": 47}
    if case.kind == "led":
        data["target_len"] = 15
    parallel = {"context": case.context, "tensor": case.tensor, "zero_stage": case.stage}
    return TrainConfig.model_validate(
        {
            "name": "phases",
            "seed": 11,
            "phases": phases_of(case.kind),
            "model": MODELS[case.kind],
            "data": data,
            "batch": {"global_batch": 4, "micro_batch": 1},
            "optim": {"learning_rate": 1e-3, "clip_norm": 0.5},
            "parallel": parallel,
            "checkpoint": {"every": 1},
            "eval": {"batches": 2},
        }
    )


class Phased(Rank):
    """One rank of a run that may begin in the middle."""

    def __init__(self, case, folder, source=None, first=0):
        super().__init__(config_of(case, folder), case.data, first)
        self.first = first
        if source is not None:
            load_fragments(self.engine, self.topology, source / str(first), first)
            self.opened.go_on(json.loads((source / f"{first}.json").read_text()))

    def train(self, last, target=None):
        """Steps up to ``last``: loss, norm, number of tokens; held-out loss where a phase ends."""
        history = []
        for step in range(self.first, last):
            if step == self.opened.phase.end_step:
                self.opened.close()
                self.opened = open_phase(self.task, self.config.phase_at(step), self.topology)
                enter_phase(self.engine, self.opened.phase, self.topology)
            phase = self.opened.phase
            since, config = step - phase.first_step, phase.config
            rate = learning_rate(since, config.steps, config.optim)
            history.append(self.train_step(step, rate))
            assert self.engine.global_steps == step + 1, "DeepSpeed counts other steps"
            if target is not None:
                self.save(step + 1, target)
            if step + 1 == phase.end_step:
                history.append(self.evaluate())
        self.close()
        return history

    def save(self, step, target):
        topology = self.topology
        take_snapshot(self.engine, topology).write(target / str(step), topology.control_group)
        counts = topology.context_rank == topology.tensor_rank == 0
        mine = self.opened.train.state_dict() if counts else {}
        cursors = {}
        for part in gather_json(mine, topology.data_context_group, topology.device):
            cursors.update(part)
        if topology.rank == 0:
            (target / f"{step}.json").write_text(json.dumps(self.opened.state(cursors)))


def resumes(case):
    """Steps from which a case is resumed."""
    if case == CASES[0]:
        return (1, 2, 3, 4, 5)
    return (2, 3) if case.kind == "char_lm" else (3,)


def walk(rank, world, cases, folder):
    """{case: (the undisturbed history, {step: history resumed there}, the same from other ranks)}.

    The first char LM is resumed everywhere; the others where phase 1 begins, and inside of it. Both
    go through the border of phase 2.
    """
    seen = {}
    for case in cases:
        mine = Path(folder, f"{case}.checkpoints")
        whole = Phased(case, folder).train(STEPS, mine)
        resumed = {first: Phased(case, folder, mine, first).train(STEPS) for first in resumes(case)}
        reference = next(other for other in CASES if other.kind == case.kind)
        theirs = Path(folder, f"{reference}.checkpoints")
        elastic = {}
        if case != reference:
            elastic = {3: Phased(case, folder, theirs, 3).train(STEPS)}
        seen[str(case)] = whole, resumed, elastic
    return seen
