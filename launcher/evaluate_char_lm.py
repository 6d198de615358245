"""A char LM over held-out text as one stream, in overlapping windows (Longformer section 4.2.2).

The windows are dealt to data ranks in stretches that follow each other; every stretch begins with
the whole context of its first window, so no number depends on how many ranks there are::

    windows     0 1 2 3 4 5 6 7 8
    2 ranks     0 0 0 0 1 1 1 1 1

Documents are joined as in training, <s> before the first and </s> behind each, and see each other
unless the recipe isolates them. Special tokens are no targets; every other token is one, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from haloformer.configs.schema import CharLmConfig, TrainConfig
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.token_line import TokenLine
from haloformer.launcher.evaluators import Evaluator, Json, Outcome, Work, summed
from haloformer.launcher.exchange import gather_json
from haloformer.model.char_lm import CharLm
from haloformer.model.streaming import StreamingCharLm, StreamRows
from haloformer.model.streaming_plan import StreamingPlan, Windows
from haloformer.model.windows import char_window

_LENGTH, _STRIDE = 32_256, 512  # the paper's
_BLOCK_ROWS = 2048


class CharLmEvaluator(Evaluator):
    """Bits per character of every token, given at least ``length - stride`` tokens before it."""

    unit: ClassVar[str] = "tokens"
    options: ClassVar[tuple[str, ...]] = ("limit", "length", "stride")
    splits_sequence: ClassVar[bool] = False

    def settings(self, config: TrainConfig, options: Mapping[str, Any]) -> dict[str, Json]:
        """Length and stride of the windows; ``limit`` counts windows.

        Raises:
            ValueError: If the stride passes over tokens.
        """
        length, stride = options.get("length", _LENGTH), options.get("stride", _STRIDE)
        if stride > length:
            raise ValueError(
                f"--stride {stride} is more than --length {length}, so that tokens would be "
                "passed over; lower the stride"
            )
        return {**super().settings(config, options), "length": length, "stride": stride}

    def evaluate(self, model: nn.Module, work: Work) -> Outcome:
        """Score the stream, or its first ``limit`` windows."""
        assert isinstance(model, CharLm) and isinstance(work.config.model, CharLmConfig)
        data, config = work.config.data, work.config.model
        index = load_index(data.eval, data.cache)
        line = TokenLine(
            ShardReader(index, data.on_corrupt),
            index.load_tokenizer(),
            isolate=data.isolate_documents,
            skip_corrupt=data.on_corrupt == "skip",
        )
        windows = Windows(line.num_slots, work.settings["length"], work.settings["stride"])
        limit = work.settings["limit"]
        count = windows.count if limit is None else min(limit, windows.count)
        reaches = [char_window(config, layer).reach_left for layer in range(config.num_layers)]
        plan = StreamingPlan(windows, reaches, _BLOCK_ROWS)
        work.pace.begin(self.unit, windows.end(count - 1))
        totals = self._score(model, plan, line, _stretch(count, work), work)
        found = summed(totals, work)
        nats = found["nats"] / max(found["targets"], 1.0)
        scores = {**work.task.rates(nats, index.characters_per_token), "nats_per_token": nats}
        facts = _facts(plan, range(count), int(found["computed"]))
        # The document at a border between two stretches is read by two ranks.
        parts = gather_json(line.skipped, work.topology.control_group, torch.device("cpu"))
        skipped = {tuple(place) for part in parts for place in part}
        if skipped:
            facts["skipped_documents"] = len(skipped)
        return Outcome(
            int(found["targets"]), {"model": scores}, facts=facts, notes=_notes(plan, facts)
        )

    def _score(
        self, model: CharLm, plan: StreamingPlan, line: TokenLine, stretch: range, work: Work
    ) -> dict[str, float]:
        """Sums of this rank's stretch, in as many steps as the longest stretch takes."""
        device = work.topology.device

        def read(first: int, stop: int) -> StreamRows:
            ids, labels, segments = line.read(first, stop)
            return StreamRows(
                torch.from_numpy(ids).to(device),
                torch.from_numpy(labels).to(device),
                None if segments is None else torch.from_numpy(segments).to(device),
            )

        turns = list(plan.turns(stretch))
        longest = torch.tensor(len(turns))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=work.topology.control_group)
        totals = {"nats": 0.0, "targets": 0.0, "computed": 0.0}
        scored = StreamingCharLm(model, plan, read).score(stretch)
        for number in range(int(longest)):
            if number >= len(turns):
                work.pace.advance(0)
                continue
            part = next(scored)
            totals["nats"] += part.loss_sum
            totals["targets"] += part.num_targets
            totals["computed"] += turns[number].num_computed
            work.pace.advance(turns[number].num_scored)
        return totals


def _stretch(count: int, work: Work) -> range:
    """This rank's windows of the first ``count``."""
    rank, ranks = work.topology.data_rank, work.topology.layout.data
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def _facts(plan: StreamingPlan, stretch: range, computed: int) -> dict[str, Json]:
    """What was computed, beside what whole windows would have taken."""
    whole = plan.windows.num_visited(stretch) * len(plan.reaches)
    return {
        "length": plan.windows.length,
        "stride": plan.windows.stride,
        "windows": len(stretch),
        "stream_tokens": plan.windows.num_rows,
        "token_layers_computed": computed,
        "token_layers_of_whole_windows": whole,
    }


def _notes(plan: StreamingPlan, facts: Mapping[str, Json]) -> list[str]:
    windows, notes = plan.windows, []
    if windows.length > windows.num_rows:
        notes.append(
            f"--length {windows.length:,} is more than the stream's {windows.num_rows:,} tokens: "
            "one window holds it all"
        )
    computed, whole = facts["token_layers_computed"], facts["token_layers_of_whole_windows"]
    why = "no state twice" if plan.computes_once else "states near a window's start again"
    notes.append(
        f"{facts['windows']:,} windows; computed {computed:,} token-layers of the {whole:,} of "
        f"whole windows ({100 * computed / whole:.2f} %): {why}"
    )
    if "skipped_documents" in facts:
        notes.append(f"damaged documents passed over: {facts['skipped_documents']}")
    return notes
