"""Streams of pairs: every pair once per epoch, the same batches on any ranks, exact resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import load_index, load_table
from haloformer.data_pipeline.pairs import PairBatch
from haloformer.data_pipeline.seq2seq import PairEvalStream, PairTrainStream

GLOBAL_BATCH = 4
NUM_PAIRS = 11  # no multiple of the batch: batches span the ends of epochs


@pytest.fixture
def folder(make_pairs) -> Path:
    path = make_pairs(NUM_PAIRS)
    assert len(load_index(path).shards) > 2
    return path


@pytest.fixture
def config(make_config):
    return make_config(seq_len=40, target_len=8)


def ranks(folder: Path, config, world: int, **changes) -> list[PairTrainStream]:
    options = {"seed": 5, "global_batch": GLOBAL_BATCH, **changes}
    return [
        PairTrainStream(folder, config, data_rank=r, data_world=world, **options)
        for r in range(world)
    ]


def rows_of(batch: PairBatch) -> dict[int, tuple]:
    """Slot -> everything the model sees of it, padding left out."""
    return {
        slot: (
            batch.input_ids[row][batch.attention_mask[row]].tolist(),
            batch.labels[row][batch.labels[row] != -100].tolist(),
            batch.global_positions[row][batch.global_mask[row]].tolist(),
            batch.was_cut[row].tolist(),
            batch.keys[row],
        )
        for row, slot in enumerate(batch.sample_ids.tolist())
    }


def global_batch(streams: list[PairTrainStream]) -> dict[int, tuple]:
    slots = {}
    for stream in streams:
        slots |= rows_of(stream.next_batch())
    assert sorted(slots) == list(range(GLOBAL_BATCH))
    return dict(sorted(slots.items()))


def test_every_pair_is_read_once_per_epoch_while_ranks_come_and_go(folder, config) -> None:
    seen: Counter = Counter()
    state = None
    orders: dict[int, list] = {}
    for turn in range(3 * NUM_PAIRS // GLOBAL_BATCH + 1):
        streams = ranks(folder, config, (1, 2, 4)[turn % 3])
        if state is not None:
            for stream in streams:
                stream.load_state(state)
        keys = [row[-1] for row in global_batch(streams).values()]
        seen.update(keys)
        for key in keys:
            orders.setdefault(key.epoch, []).append(key[1:])
        states = [stream.state_dict() for stream in streams]
        state = states[0]
        assert all(other == state for other in states)
    shards = load_index(folder).shards
    whole = [(shard, n) for shard, info in enumerate(shards) for n in range(info.num_samples)]
    for epoch in range(3):
        assert sorted(orders[epoch]) == whole
    assert set(seen.values()) == {1}
    assert orders[0] != orders[1] and orders[0] != whole


def test_any_number_of_ranks_sees_the_same_batches(folder, config) -> None:
    worlds = [ranks(folder, config, world) for world in (1, 2, 4)]
    for _ in range(8):
        first, *others = [global_batch(streams) for streams in worlds]
        assert all(other == first for other in others)


def test_resume_from_every_step_continues_identically(folder, config) -> None:
    run = ranks(folder, config, 1)
    states, batches = [], []
    for _ in range(9):
        states.append(run[0].state_dict())
        batches.append(global_batch(run))
    for step in range(9):
        again = ranks(folder, config, 2)
        for stream in again:
            stream.load_state(states[step])
        for expected in batches[step : step + 3]:
            assert global_batch(again) == expected


def test_long_texts_keep_their_beginnings_and_are_counted(folder, config) -> None:
    stream = ranks(folder, config, 1, global_batch=NUM_PAIRS)[0]
    specials, encode = stream.tokenizer.specials, stream.tokenizer.encode
    num_cut = np.zeros(2, int)
    batch = stream.next_batch()
    for source, target, places, was_cut, _ in rows_of(batch).values():
        n = int(source[1]) - int(encode("a")[0])
        texts = chr(97 + n) * (5 * n + 1), str(n % 10) * (n + 1)
        for ids, text, limit in zip((source, target), texts, (40, 8), strict=True):
            kept = encode(text)[: limit - 2].tolist()
            assert ids == [specials.bos, *kept, specials.eos]
        assert was_cut == [5 * n + 1 > 38, n + 1 > 6]
        assert places == [0]
        num_cut += was_cut
    assert num_cut.tolist() == [3, 5] == batch.was_cut.sum(0).tolist()
    real = [len(row[0]) + len(row[1]) for row in rows_of(batch).values()]
    assert batch.num_tokens == sum(real)


def test_micro_batches_are_the_batch_in_parts_and_no_wider_than_they_must(folder, config) -> None:
    batch = ranks(folder, config, 1, pad_multiple=4)[0].next_batch()
    assert batch.input_ids.shape[1] % 4 == batch.labels.shape[1] % 4 == 0
    parts = list(batch.split(1))
    assert {k: v for part in parts for k, v in rows_of(part).items()} == rows_of(batch)
    for part in parts:
        for real, padded in (
            (part.attention_mask.sum(), part.input_ids.shape[1]),
            ((part.labels != -100).sum(), part.labels.shape[1]),
        ):
            assert padded % 4 == 0 and real <= padded < real + 4
    assert len({part.input_ids.shape for part in parts}) > 1


@pytest.mark.parametrize("num_batches", [None, 2])
def test_evaluation_reads_every_pair_once_and_alike_on_any_ranks(
    num_batches, folder, config
) -> None:
    seen = []
    for world in (1, 2, 4):
        slots: dict[tuple[int, int], tuple] = {}
        for rank in range(world):
            stream = PairEvalStream(
                folder, config, global_batch=4, data_rank=rank, data_world=world,
                num_batches=num_batches,
            )  # fmt: skip
            first, second = list(stream), list(stream)
            assert [b.keys for b in first] == [b.keys for b in second]
            for step, batch in enumerate(first):
                slots |= {(step, slot): row for slot, row in rows_of(batch).items()}
        seen.append(slots)
    assert seen[0] == seen[1] == seen[2]
    keys = [row[-1] for _, row in sorted(seen[0].items()) if row[-1] is not None]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert len(keys) == (NUM_PAIRS if num_batches is None else 8)
    padding = [row for row in seen[0].values() if row[-1] is None]
    assert all(row[:3] == ([], [], []) for row in padding)
    assert len(padding) == (1 if num_batches is None else 0)


def test_a_damaged_pair_stops_or_is_replaced_by_padding(folder, config, make_config) -> None:
    index = load_index(folder)
    shard = folder / index.shards[0].name
    content = bytearray(shard.read_bytes())
    content[int(load_table(index, 0)["offset"][1])] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptSampleError, match="sample 1: the tokens are damaged"):
        ranks(folder, config, 1, global_batch=NUM_PAIRS)[0].next_batch()
    lenient = make_config(seq_len=40, target_len=8, on_corrupt="skip")
    stream = ranks(folder, lenient, 1, global_batch=NUM_PAIRS)[0]
    keys = stream.next_batch().keys
    assert keys.count(None) == stream.num_skipped == 1


def test_state_of_another_run_is_refused_and_changes_nothing(folder, config) -> None:
    stream = ranks(folder, config, 1)[0]
    stream.next_batch()
    before = stream.state_dict()
    for bad in ({}, {"0": [0, 0, 0, 0]}, {"pairs": [0, NUM_PAIRS]}, {"pairs": [0, -1]}):
        with pytest.raises(DataError, match="state"):
            stream.load_state(bad)
        assert stream.state_dict() == before


def test_a_stream_of_pairs_refuses_text_ranks_and_tokenizers(make_dataset, folder, config) -> None:
    text = make_dataset([50] * 5, name="text")
    with pytest.raises(DataError, match="it holds documents, and this model is trained on pairs"):
        ranks(text, config, 1)
    with pytest.raises(ValueError, match="global_batch 4 is not a multiple of 3"):
        ranks(folder, config, 3)
    with pytest.raises(DataError, match="did not make the tokens"):
        PairEvalStream(
            folder, config, global_batch=1, data_rank=0, data_world=1, tokenizer_sha256="0" * 64
        )


def test_identity_tells_runs_apart(folder, config) -> None:
    base = ranks(folder, config, 1)[0].identity()
    assert ranks(folder, config, 2)[1].identity() == base
    assert ranks(folder, config, 1, seed=6)[0].identity() != base
