"""Where the time of a whole training step goes: a table by kind of work, and a flame picture.

One rank on one thread, with torch's profiler around one step: ``mlm`` and ``led`` are the cases of
``haloformer bench step``, ``char_lm`` is one sequence of the recipe char_lm_small in fp32 without
recompute. Times are CPU time of operators, so a busy machine blurs them less than a clock would;
the profiler itself adds a few percent to small operators.

    python experiments/step_profile.py mlm --name before
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass
class Frame:
    """One box of the flame picture: seconds in total, and its children by name."""

    seconds: float = 0.0
    children: dict[str, Frame] = field(default_factory=lambda: defaultdict(Frame))

    def add(self, path: list[str], seconds: float) -> None:
        """Add an operator's own time to every frame on its path."""
        self.seconds += seconds
        if path:
            self.children[path[0]].add(path[1:], seconds)


def char_lm_step() -> Callable[[int], float]:
    """One sequence of the first phase of char_lm_small."""
    import numpy as np
    import torch

    from haloformer.configs.load import load_config
    from haloformer.data_pipeline.batch import Batch
    from haloformer.launcher.engine import backward, build_engine, rank_loss
    from haloformer.launcher.runtime import init_distributed
    from haloformer.launcher.tasks import task_of
    from haloformer.launcher.topology import Layout, build_topology
    from haloformer.model.dropout_sites import DropoutStep

    config = load_config(
        "char_lm_small",
        ["batch.global_batch=1", "parallel.precision=fp32", "model.recompute=none"],
    )
    init_distributed()
    topology = build_topology(Layout(data=1, context=1))
    task = task_of(config)
    torch.manual_seed(0)
    engine = build_engine(task.build_model(config, 256, topology), config, topology)
    text = np.random.default_rng(0).integers(0, 256, (1, config.data.seq_len + 1))
    batch = Batch(
        input_ids=text[:, :-1],
        labels=text[:, 1:],
        attention_mask=np.ones((1, config.data.seq_len), np.bool_),
        segment_ids=None,
        global_positions=np.zeros((1, 0), np.int64),
        global_mask=np.zeros((1, 0), np.bool_),
        sample_ids=np.zeros(1, np.int64),
        spans=((),),
    )

    def step(number: int) -> float:
        (inputs,) = task.micro_batches(batch, 1, topology)
        output = engine(*inputs, DropoutStep(0, number))
        backward(engine, rank_loss(output.loss_sum, config.data.seq_len, topology))
        engine.step()
        return output.loss_sum.item()

    return step


def bench_step(name: str, tokens: int | None) -> Callable[[int], float]:
    """A case of ``haloformer bench step``."""
    from haloformer.launcher.bench_step_cases import REAL
    from haloformer.launcher.bench_step_worker import ours

    case = REAL[name]
    return ours(case if tokens is None else replace(case, tokens=tokens), "cpu")


def profile_step(step: Callable[[int], float], steps: int) -> list[Any]:
    """Operator events of one training step, after ``steps`` others."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    marks: list[Any] = []

    def enter(module: torch.nn.Module, _: Any) -> None:
        marks.append(record_function(f"module: {type(module).__name__}"))
        marks[-1].__enter__()

    def leave(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    for number in range(steps):
        step(number)
    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave),
    ]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(steps)
    for hook in hooks:
        hook.remove()
    return list(found.events())


def own_times(events: list[Any]) -> Iterator[tuple[list[str], float]]:
    """The path of every operator, outermost first, and its own seconds.

    An operator of the backward is put under the module whose forward it belongs to.
    """
    home: dict[int, list[str]] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            modules = [name for name in _names(event) if name.startswith("module: ")]
            home.setdefault(event.sequence_nr, modules)
    for event in events:
        seconds = event.self_cpu_time_total * 1e-6
        if seconds <= 0.0:
            continue
        names = _names(event)
        node = next((e for e in _ancestors(event) if e.name.startswith(_BACKWARD)), None)
        if node is None:
            first = next((i for i, n in enumerate(names) if n.startswith("module: ")), None)
            if first is not None:
                names = ["forward", *names[first:]]
            elif any(name.startswith("Optimizer") for name in names):
                names = ["optimizer", *names]
        else:
            inner = names[names.index(node.name) + 1 :]
            names = [
                "backward",
                *home.get(node.sequence_nr, []),
                *(inner if inner else [node.name]),
            ]
        yield [name.removeprefix("module: ") for name in names], seconds


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _names(event: Any) -> list[str]:
    return [e.name for e in _ancestors(event)][::-1]


_KINDS = (
    ("attention", ("SelfAttention", "WindowedAttention", "_OverlappedBand")),
    ("AdamW", ("optimizer",)),
)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise")
_BY_OPERATOR = {
    "products": {f"aten::{x}" for x in _PRODUCTS} | {f"mkldnn::{x}" for x in _PRODUCTS}
    | {"aten::addmm_", "aten::baddbmm_"},
    "softmax": {"aten::exp2_", "aten::amax", "aten::sum", "aten::sub_", "aten::exp2"},
    "norm": {"aten::native_layer_norm", "aten::native_layer_norm_backward"},
    "gelu": {"aten::gelu", "aten::gelu_backward"},
    "dropout": {
        "aten::bitwise_xor_", "aten::bitwise_xor", "aten::__rshift__", "aten::__and__",
        "aten::bitwise_and", "aten::__ixor__", "aten::ge", "aten::where", "aten::bernoulli_",
    },
    "copies": {"aten::copy_", "aten::cat", "aten::_to_copy", "aten::clone"},
    "zeros": {"aten::fill_", "aten::zero_"},
    "sums": {"aten::add_", "aten::add"},
    "messages": {"c10d::allreduce_", "gloo:all_reduce", "c10d::send", "c10d::recv_"},
}  # fmt: skip


def kind_of(path: list[str]) -> str:
    """What an operator's time is spent on."""
    where = next((kind for kind, names in _KINDS if any(n in p for n in names for p in path)), "")
    what = next((kind for kind, ops in _BY_OPERATOR.items() if path[-1] in ops), path[-1])
    if where == "AdamW":
        return where
    if where == "attention" and any("_OverlappedBand" in p or "WindowAttention" in p for p in path):
        return f"attention {what}"
    return what


def main() -> None:
    """Profile, print the table, write ``results/step_profile-CASE-NAME.{json,png}``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=("mlm", "led", "char_lm"))
    parser.add_argument("--name", default="now", help="part of the files' names")
    parser.add_argument("--tokens", type=int, help="other lengths than the case's own")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before")
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from haloformer.launcher.launch import choose_port

    os.environ["MASTER_PORT"] = str(choose_port(None))
    char_lm = arguments.case == "char_lm"
    step = char_lm_step() if char_lm else bench_step(arguments.case, arguments.tokens)
    root, kinds = Frame(), defaultdict(float)
    for path, seconds in own_times(profile_step(step, arguments.warm_up)):
        root.add(path, seconds)
        kinds[kind_of(path)] += seconds
    table = sorted(kinds.items(), key=lambda item: -item[1])
    print(f"{arguments.case}, one thread: {root.seconds:.2f} s of CPU")
    for kind, seconds in table[:18]:
        print(f"{kind:44}{seconds:8.2f} s {seconds / root.seconds:6.1%}")
    stem = RESULTS / f"step_profile-{arguments.case}-{arguments.name}"
    record = {"case": arguments.case, "tokens": arguments.tokens, "seconds": root.seconds}
    stem.with_suffix(".json").write_text(
        json.dumps(record | {"kinds": {k: round(s, 3) for k, s in table}}, indent=1) + "\n"
    )
    draw(root, f"{arguments.case}: {root.seconds:.1f} s of CPU on one thread", stem)


def draw(root: Frame, title: str, stem: Path) -> None:
    """Boxes as wide as their time; a box stands on the one that called it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(16, 6))
    colors = plt.get_cmap("YlOrRd")

    def box(frame: Frame, left: float, level: int) -> int:
        deepest = level
        for name, child in sorted(frame.children.items(), key=lambda item: -item[1].seconds):
            if child.seconds < 0.004 * root.seconds:
                continue
            shade = colors(0.25 + 0.5 * (hash(name) % 7) / 7)
            axes.barh(level, child.seconds, left=left, height=0.95, color=shade, edgecolor="w")
            letters = int(child.seconds / root.seconds * 220)
            if letters > 3:
                label = name.removeprefix("aten::").removeprefix(_BACKWARD)
                axes.text(left, level, " " + label[:letters], va="center", fontsize=6, clip_on=True)
            deepest = max(deepest, box(child, left, level + 1))
            left += child.seconds
        return deepest

    box(root, 0.0, 0)
    axes.set(xlabel="seconds of CPU", title=title, xlim=(0, root.seconds), yticks=[])
    figure.tight_layout()
    figure.savefig(stem.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
