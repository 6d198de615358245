"""Sequence lengths that change within a run: a function of the step, and nothing is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from haloformer.data_pipeline.blend import Corpus
from haloformer.data_pipeline.seq2seq import PairTrainStream
from haloformer.data_pipeline.stream import EvalStream, TrainStream

STAGES = [{"steps": 3, "seq_len": 12}, {"steps": 4, "seq_len": 50}]
LENGTHS = [12] * 3 + [50] * 4 + [32] * 5  # the final seq_len of the recipes here is 32
PLACE = {"seed": 5, "global_batch": 4}


def ranks(data, config, world: int, kind=TrainStream, pad_multiple: int = 1) -> list:
    return [
        kind(data, config, data_rank=r, data_world=world, pad_multiple=pad_multiple, **PLACE)
        for r in range(world)
    ]


def union(streams) -> dict[str, list[int]]:
    return {key: value for stream in streams for key, value in stream.state_dict().items()}


def global_batch(streams) -> dict[int, tuple]:
    slots = {}
    for stream in streams:
        batch = stream.next_batch()
        for row, slot in enumerate(batch.sample_ids.tolist()):
            slots[slot] = (batch.input_ids[row].tolist(), batch.labels[row].tolist())
    return slots


@pytest.mark.parametrize("pad_multiple", [1, 8])
def test_every_step_has_the_length_of_its_stage(pad_multiple, make_dataset, make_config) -> None:
    folder, config = make_dataset([40, 3, 90, 1] * 4), make_config(stages=STAGES)
    stream = ranks(folder, config, 1, pad_multiple=pad_multiple)[0]
    for step, length in enumerate(LENGTHS):
        assert config.seq_len_at(step) == length
        batch = stream.next_batch()
        assert batch.input_ids.shape == (4, -(-length // pad_multiple) * pad_multiple)
        assert batch.attention_mask.sum(1).tolist() == [length] * 4


@pytest.mark.parametrize("blend", [False, True])
def test_resume_within_any_stage_continues_identically(blend, make_dataset, make_config) -> None:
    folder, config = make_dataset([40, 3, 90, 1] * 4), make_config(stages=STAGES)
    other = make_dataset([70] * 5, name="other")
    data = [Corpus(folder, 2.0), Corpus(other, 1.0)] if blend else folder
    run = ranks(data, config, 2)
    states, batches = [], []
    for _ in LENGTHS:
        states.append(union(run))
        batches.append(global_batch(run))
    for step in range(len(LENGTHS)):
        again = ranks(data, config, (1, 4)[step % 2])
        for stream in again:
            stream.load_state(states[step])
        for expected in batches[step : step + 3]:
            assert global_batch(again) == expected


def test_no_token_is_lost_where_the_length_changes(make_dataset, make_config) -> None:
    lengths = [40, 3, 90, 1, 66, 20]
    stream = ranks(make_dataset(lengths), make_config(stages=STAGES), 1)[0]
    read: Counter = Counter()
    for _ in LENGTHS:
        for spans in stream.next_batch().spans:
            for span in spans:
                read.update((span[:3], token) for token in range(span.start, span.stop))
    assert set(read.values()) == {1}
    for epoch in range(2):  # the end of epoch 0 lies in the second stage
        assert sum(place[0] == epoch for place, _ in read) == sum(lengths)


def test_pairs_are_cut_by_the_stage(make_pairs, make_config) -> None:
    folder, config = make_pairs(30), make_config(stages=STAGES, target_len=8)
    stream = ranks(folder, config, 1, kind=PairTrainStream)[0]
    again = ranks(folder, config, 1, kind=PairTrainStream)[0]
    for length in LENGTHS:
        again.load_state(stream.state_dict())
        batch = stream.next_batch()
        assert (again.next_batch().input_ids == batch.input_ids).all()
        for row, key in enumerate(batch.keys):
            num_source = stream._opened[0][0].reader.pair_lengths(key.shard, key.sample)[0]
            assert batch.attention_mask[row].sum() == min(num_source + 2, length)


def test_evaluation_has_the_final_length(make_dataset, make_config) -> None:
    held = EvalStream(
        make_dataset([300], name="eval"), make_config(stages=STAGES), global_batch=2, data_rank=0,
        data_world=1,
    )  # fmt: skip
    assert {batch.input_ids.shape for batch in held} == {(2, 32)}
