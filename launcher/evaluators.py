"""How each kind of trained model is scored on held-out data: one object per kind.

The command and the ranks know an evaluator by these few methods, and no kind by name.

    command   settings = evaluator.settings(config, options)     before any rank starts
    ranks     outcome = evaluator.evaluate(model, work)           the same on every rank
    command   prints outcome.scores, writes --json, tells MLflow
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from haloformer.configs.schema import TrainConfig

if TYPE_CHECKING:  # megatron takes seconds to load, which the command need not wait for
    from torch import nn

    from haloformer.data_pipeline.sample_stream import SampleEvalStream
    from haloformer.launcher.evaluate_pace import Pace
    from haloformer.launcher.tasks import HeldOutSource, Task
    from haloformer.launcher.topology import Topology

Json = Any  # what json.dumps takes
Scores = dict[str, dict[str, float]]  # candidate, such as "model" or a baseline -> metric -> value


@dataclass(frozen=True)
class Work:
    """What one rank needs to evaluate.

    Attributes:
        config: The recipe of the model; its parallel sizes are those of these ranks, and
            ``data.eval`` is what is evaluated.
        task: Of that recipe.
        topology: This rank's place.
        settings: What ``Evaluator.settings`` gave.
        pace: To be told what is done, equally often on every rank.
    """

    config: TrainConfig
    task: Task
    topology: Topology
    settings: Mapping[str, Json]
    pace: Pace

    @property
    def counts(self) -> bool:
        """Whether what this rank found counts: context and tensor ranks see the same examples."""
        return self.topology.context_rank == 0 and self.topology.tensor_rank == 0

    def open_stream(self) -> HeldOutSource:
        """The held-out stream, one sequence of a batch for each data-parallel rank.

        So example ``number * layout.data + data_rank`` of the data set is in this rank's batch
        ``number``; behind the last one there are rows of padding.
        """
        layout, data = self.topology.layout, self.config.data
        return self.task.held_out_stream(
            data.eval,
            data,
            global_batch=layout.data,
            data_rank=self.topology.data_rank,
            data_world=layout.data,
            pad_multiple=layout.context,
        )


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found, the same on every rank.

    Attributes:
        count: Things scored, of the evaluator's ``unit``.
        scores: Candidate -> metric -> value; all candidates have the same metrics.
        records: One per example, in the order of the data set; for the JSON file.
        facts: What else the JSON file shall say.
        notes: Lines for a person, below the table.
    """

    count: int
    scores: Scores
    records: list[dict[str, Json]] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Evaluator(ABC):
    """How one kind of model is scored.

    Attributes:
        unit: What is counted, in the plural.
        options: Options of the command line that it reads, without dashes; a user who gives
            another is told.
        decimals: Digits of its scores that a person wants to see.
        records_key: Name of the records in the JSON file.
        splits_sequence: Whether ranks can share one sequence (context parallel).
        splits_weights: Whether ranks can share the weights (tensor parallel).
    """

    unit: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ("limit",)
    decimals: ClassVar[int] = 4
    records_key: ClassVar[str] = "examples"
    splits_sequence: ClassVar[bool] = True
    splits_weights: ClassVar[bool] = True

    def settings(self, config: TrainConfig, options: Mapping[str, Any]) -> dict[str, Json]:
        """Check options before any rank starts, and fill in those that were not given.

        Args:
            config: The recipe of the model.
            options: Those of ``self.options`` that were given.

        Returns:
            For the ranks, as ``Work.settings``.

        Raises:
            ValueError: If one cannot be used with this model, or something is not installed.
        """
        return {"limit": options.get("limit")}

    @abstractmethod
    def evaluate(self, model: nn.Module, work: Work) -> Outcome:
        """Score the held-out data; called on every rank, without gradients.

        Args:
            model: What ``Task.build_model`` makes, in eval mode, with the weights that were
                trained; a transformers folder has no tensor group.
            work: What there is to do.
        """


def dealt(
    stream: SampleEvalStream[Any, Any], unit: str, work: Work
) -> Iterator[tuple[int, Any, Any]]:
    """This rank's part of the examples, or of the first ``limit``, one after the other.

    ::

        5 examples, 2 data ranks     rank 0: 0 2 4     rank 1: 1 3

    Context and tensor ranks see the same ones. The pace is told of each when the next is asked for.

    Args:
        stream: From ``work.open_stream``.
        unit: What is counted, in the plural.
        work: What there is to do.

    Yields:
        Number in the data set, the batch of it alone, and what the task feeds the model.
    """
    total, limit = stream.index.num_samples, work.settings["limit"]
    total = total if limit is None else min(total, limit)
    work.pace.begin(unit, total)
    for batch_number, batch in enumerate(stream):
        first = batch_number * work.topology.layout.data
        if first >= total:
            break
        number = first + work.topology.data_rank
        # None is left for this rank, or it is damaged and such are skipped.
        if number >= total or batch.keys[0] is None:
            work.pace.advance(0)
            continue
        (inputs,) = work.task.micro_batches(batch, 1, work.topology)
        yield number, batch, inputs
        work.pace.advance(1)


def gathered(records: Sequence[dict[str, Json]], work: Work) -> list[dict[str, Json]]:
    """The records of all ranks, in the order of the data set.

    Args:
        records: Of this rank, each with its ``number`` in the data set; it is taken out.
        work: Says which ranks count.
    """
    import torch

    from haloformer.launcher.exchange import gather_json

    mine = list(records) if work.counts else []
    parts = gather_json(mine, work.topology.control_group, torch.device("cpu"))
    ordered = sorted((one for part in parts for one in part), key=lambda one: one["number"])
    return [{key: value for key, value in one.items() if key != "number"} for one in ordered]


def summed(values: Mapping[str, float], work: Work) -> dict[str, float]:
    """Sums over the ranks that hold different rows: data and context ranks.

    Args:
        values: Of this rank's rows; the same names on every rank. Summed in float64.
        work: Says which ranks those are.
    """
    import torch
    import torch.distributed as dist

    topology = work.topology
    totals = torch.tensor(list(values.values()), dtype=torch.float64, device=topology.device)
    dist.all_reduce(totals, group=topology.data_context_group)
    return dict(zip(values, totals.tolist(), strict=True))


def mean_scores(per_example: Sequence[Scores]) -> Scores:
    """Means of the scores of examples, every candidate and metric for itself."""
    first = per_example[0]
    return {
        candidate: {
            metric: fmean(one[candidate][metric] for one in per_example) for metric in metrics
        }
        for candidate, metrics in first.items()
    }
