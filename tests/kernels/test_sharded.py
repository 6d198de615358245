"""The sharded layer equals the loops on the whole sequence, for every number of ranks.

All cases run in one start of four processes: each rank computes its part of the loops' truth, then
the groups of 1, 2, 3 and 4 ranks work through the cases. The tests look at what came back.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from cases import LAYER_CASES, LayerCase, gradients, random_layer_case
from dist import run_ranks
from haloformer.kernels.ranks import CommCounter, Direction
from haloformer.kernels.sharded import (
    AttentionDropoutSites,
    DropoutSite,
    SequenceShard,
    sharded_attention,
    sharded_band,
)
from haloformer.kernels.spec import WindowSpec

RANKS = 4
TENSORS = ("out", "d_query", "d_key", "d_value", "d_global_query", "d_global_key", "d_global_value")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def jobs_of(seeds):
    """(case, world size): the named ones at all sizes, each random one at the size it is for."""
    named = [(case, size) for case in LAYER_CASES for size in case.world_sizes]
    return named + [(random_layer_case(seed), 1 + seed % 4) for seed in seeds]


def groups_of_every_size(rank):
    """World size -> (group, rank in it, number of the group), for each size this rank serves."""
    found = {}
    for size in range(1, RANKS + 1):
        for number in range(RANKS // size):
            members = list(range(number * size, (number + 1) * size))
            group = dist.new_group(members) if size > 1 else None
            if rank in members:
                found[size] = (group, rank - members[0], number)
    return found


def run_shard(case, dtype, group, rank, world_size):
    """This rank's rows of the output and all gradients, and what it sent."""
    counter = CommCounter()
    shard = case.shard(group, rank, world_size)
    here = slice(shard.first_row, shard.first_row + shard.num_rows)
    *inputs, grad_out = (x.to(dtype) for x in case.tensors())
    # The global queries are whole on every rank; everything else is cut by rows.
    inputs = [x if i == 3 else x[:, here] for i, x in enumerate(inputs)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = sharded_attention(*inputs, case.spec, shard, dropout=case.sites(), counter=counter)
    return [out.detach(), *gradients(out, inputs, grad_out[:, here])], counter


def work(rank, world_size, seeds):
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN: unwritten elements show
    jobs = jobs_of(seeds)
    truths = {case.name: case.truth() for case in list(dict(jobs))[rank::RANKS]}
    groups = groups_of_every_size(rank)
    found = {}
    for index, (case, size) in enumerate(jobs):
        if size not in groups:
            continue
        group, group_rank, number = groups[size]
        if index % (RANKS // size) == number:
            for dtype in TOLERANCE:
                found[index, dtype] = run_shard(case, dtype, group, group_rank, size)
    return truths, found


@dataclass
class Results:
    jobs: list
    truths: dict
    found: list  # per rank: (job, dtype) -> (tensors, counter)

    def errors(self, name=None):
        """What differs from the truth, in words."""
        faults = []
        for index, (case, size) in enumerate(self.jobs):
            for dtype, limit in TOLERANCE.items():
                if name is not None and case.name != name:
                    continue
                whole = self.whole(index, dtype)
                assert len(whole) == len(TENSORS)
                for tensor, x, y in zip(TENSORS, whole, self.truths[case.name], strict=True):
                    assert x.shape == y.shape
                    if x.numel() == 0:
                        continue
                    error = float((x.double() - y).abs().max() / y.abs().max().clamp(min=1.0))
                    if not error <= limit:
                        faults.append(f"{case}, {size} ranks, {dtype}: {tensor} is off by {error}")
        return faults

    def whole(self, index, dtype):
        parts = [rank[index, dtype][0] for rank in self.found if (index, dtype) in rank]
        assert len(parts) == self.jobs[index][1]
        return [
            # Every rank's gradient of the global queries is a share, like that of a weight.
            sum(same) if name == "d_global_query" else torch.cat(same, dim=1)
            for name, same in zip(TENSORS, zip(*parts, strict=True), strict=True)
        ]


def results_for(seeds, timeout):
    answers = run_ranks(RANKS, work, seeds, timeout=timeout)
    truths = {name: truth for answer in answers for name, truth in answer[0].items()}
    return Results(jobs_of(seeds), truths, [answer[1] for answer in answers])


@pytest.fixture(scope="module")
def results():
    return results_for(range(300), 240.0)


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_equals_the_loops_on_every_number_of_ranks(case, results):
    assert not results.errors(case.name)


def test_300_random_layers_equal_the_loops(results):
    assert len(results.jobs) >= 300 + len(LAYER_CASES)
    assert not results.errors()


@pytest.mark.extended
def test_2000_random_layers_equal_the_loops():
    for start in range(1000, 3000, 500):
        assert not results_for(range(start, start + 500), 900.0).errors()


def test_each_side_sends_its_reach_and_no_row_more(results):
    """What travels depends on the windows alone, cut where there is no one left to send to."""
    seen = 0
    for index, (case, size) in enumerate(results.jobs):
        rows = case.length // size
        for rank, found in enumerate(
            rank for rank in results.found if (index, torch.float64) in rank
        ):
            counter = found[index, torch.float64][1]
            reaches = {
                (left * d, right * d)
                for left, right, d in zip(case.left, case.right, case.dilation, strict=True)
            }
            higher, lower = (size - 1 - rank) * rows, rank * rows
            sent = counter.halo_rows
            assert sent[Direction.RIGHT] == sum(min(left, higher) for left, _ in reaches)
            assert sent[Direction.LEFT] == sum(min(right, lower) for _, right in reaches)
            # Gradients go home: this rank returns what it got.
            home = counter.halo_gradient_rows
            assert home[Direction.LEFT] == sum(min(left, lower) for left, _ in reaches)
            assert home[Direction.RIGHT] == sum(min(right, higher) for _, right in reaches)
            seen += 1
    assert seen > 600


def test_every_rank_reduces_the_same_whatever_it_owns(results):
    """A rank that skipped a call for want of global tokens would leave the others waiting."""
    for index, (case, size) in enumerate(results.jobs):
        job = (index, torch.float64)
        counts = {found[job][1].reduced_bytes for found in results.found if job in found}
        assert len(counts) == 1
        assert (counts != {0}) == (size > 1 and any(case.globals_))


def test_padding_gets_zeros_and_no_gradient(results):
    for index, (case, _) in enumerate(results.jobs[: len(results.jobs) - 300]):
        out, d_query, d_key, d_value, _, d_global_key, d_global_value = results.whole(
            index, torch.float32
        )
        for example, places in enumerate(case.padding):
            for x in (out, d_query, d_key, d_value, d_global_key, d_global_value):
                assert (x[example, list(places)] == 0).all(), case


def test_dropout_is_the_same_for_every_number_of_ranks(results):
    """Equal to the loops with dropout on, and the loops do drop."""
    case = next(case for case in LAYER_CASES if case.name == "dropout")
    whole, kept = results.truths[case.name][0], LayerCase(**{**vars(case), "dropout": 0.0})
    assert (whole - kept.truth()[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layers_are_as_good_as_their_rounding(dtype):
    for case in LAYER_CASES:
        if case.dropout == 0.0:
            found, _ = run_shard(case, dtype, None, 0, 1)
            for x, y in zip(found, case.truth(), strict=True):
                assert x.dtype == dtype
                if x.numel():
                    error = (x.double() - y).abs().max() / y.abs().max().clamp(min=1.0)
                    assert error < 8 * torch.finfo(dtype).eps, case


SHARD = {
    "length": 8,
    "attention_mask": torch.ones(1, 8, dtype=torch.bool),
    "segment_ids": None,
    "global_positions": torch.tensor([[0, 5]]),
    "global_mask": torch.ones(1, 2, dtype=torch.bool),
    "sample_ids": torch.arange(1),
}
HALF_MASK = torch.arange(8)[None] < 4
BAD_SHARDS = {
    "length 7 is not a multiple of the 2 ranks": {"length": 7},
    "position 8 is outside a sequence of 8 rows": {"global_positions": torch.tensor([[0, 8]])},
    "position -1 is outside": {"global_positions": torch.tensor([[-1, 3]])},
    "given twice": {"global_positions": torch.tensor([[3, 3]])},
    "position 5 of example 0 is padding": {"attention_mask": HALF_MASK},
    "attention_mask has shape": {"attention_mask": HALF_MASK[:, :4]},
    "global_mask is torch.int64": {"global_mask": torch.ones(1, 2, dtype=torch.int64)},
    "sample_ids has shape": {"sample_ids": torch.arange(3)},
}
BAD_CALLS = {
    "the window spec is for 3 heads, query has 2": {
        "spec": WindowSpec((1,) * 3, (1,) * 3, (1,) * 3)
    },
    "key has shape (1, 3, 2, 4); it must be (1, 4, 2, 4)": {"key": torch.ones(1, 3, 2, 4)},
    "value is torch.float32 and query is torch.float64": {"value": torch.ones(1, 4, 2, 4)},
    "query has shape (1, 2, 2, 4)": {"query": torch.ones(1, 2, 2, 4)},
    "global_query has shape (1, 1, 2, 4)": {"global_query": torch.ones(1, 1, 2, 4)},
    "backend 'cuda' is not one of auto, chunks, triton, loop": {"backend": "cuda"},
    "backend 'triton' cannot run: ": {"backend": "triton"},
    "dropout rate 1.5 is outside [0, 1)": {
        "dropout": AttentionDropoutSites(DropoutSite(0.1, 1), DropoutSite(1.5, 2))
    },
    "dropout rate 1.25 is outside [0, 1)": {
        "dropout": AttentionDropoutSites(DropoutSite(1.25, 1), DropoutSite(0.1, 2))
    },
}


def test_a_shard_of_another_batch_is_refused():
    shard = SequenceShard(group=None, rank=0, world_size=1, **SHARD)
    x = torch.ones(2, 8, 2, 4)
    spec = WindowSpec((1, 1), (1, 1), (1, 2))
    with pytest.raises(ValueError, match=r"sample_ids has shape \(1,\); it must be \(2,\)"):
        sharded_band(x, x, x, x[:, :2], spec, shard)


def refuse(rank, world_size):
    """What each bad call says on this rank; the ranks still understand one another afterwards."""
    said = []
    for change in BAD_SHARDS.values():
        with pytest.raises(ValueError) as caught:
            SequenceShard(group=dist.group.WORLD, rank=rank, world_size=2, **{**SHARD, **change})
        said.append(str(caught.value))
    shard = SequenceShard(group=dist.group.WORLD, rank=rank, world_size=2, **SHARD)
    good = {
        name: torch.ones(1, 2 if name == "global_query" else 4, 2, 4, dtype=torch.float64)
        for name in ("query", "key", "value", "global_query", "global_key", "global_value")
    }
    good["spec"] = WindowSpec((1, 1), (1, 1), (1, 2))
    for change in BAD_CALLS.values():
        counter = CommCounter()
        with pytest.raises(ValueError) as caught:
            sharded_attention(shard=shard, counter=counter, **{**good, **change})
        assert counter == CommCounter()
        said.append(str(caught.value))
    assert sharded_attention(shard=shard, **good).isfinite().all()
    return said


def test_refusals_are_alike_on_all_ranks_and_nobody_hangs():
    first, second = run_ranks(2, refuse, timeout=60.0)
    assert first == second
    for message, expected in zip(first, [*BAD_SHARDS, *BAD_CALLS], strict=True):
        assert expected in message and "\n" not in message
