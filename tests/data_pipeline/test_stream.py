from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.packing import Span
from haloformer.data_pipeline.rank_stream import seed_of_phase
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.stream import EvalStream, TrainStream

GLOBAL_BATCH = 4
CORPORA = {
    "mixed": [40, 3, 120, 1, 17, 64, 5, 5, 5, 90, 33, 2, 250, 8],
    "one giant": [2000],
    "tiny": [1, 2, 1, 3, 1, 1, 2] * 12,
    "fewer than streams": [150, 300],
    "giant among tiny": [3, 4, 900, 2, 5, 3],
}


def ranks(folder: Path, config, world: int, **changes) -> list[TrainStream]:
    options = {"seed": 5, "global_batch": GLOBAL_BATCH, **changes}
    return [
        TrainStream(folder, config, data_rank=r, data_world=world, **options) for r in range(world)
    ]


def union_state(streams: list[TrainStream]) -> dict[str, list[int]]:
    return {key: value for stream in streams for key, value in stream.state_dict().items()}


def global_batch(streams: list[TrainStream]) -> dict[int, tuple]:
    """One step of all ranks: slot -> everything the model sees of it."""
    slots = {}
    for stream in streams:
        batch = stream.next_batch()
        for row, slot in enumerate(batch.sample_ids.tolist()):
            positions = batch.global_positions[row][batch.global_mask[row]].tolist()
            slots[slot] = (
                batch.input_ids[row].tolist(),
                batch.labels[row].tolist(),
                batch.attention_mask[row].tolist(),
                None if batch.segment_ids is None else batch.segment_ids[row].tolist(),
                positions,
                batch.spans[row],
            )
    assert sorted(slots) == list(range(GLOBAL_BATCH))
    return slots


def tokens_read(spans: list[Span], epoch: int) -> Counter[tuple[int, int, int]]:
    return Counter(
        (span.shard, span.sample, token)
        for span in spans
        if span.epoch == epoch
        for token in range(span.start, span.stop)
    )


def every_token(folder: Path) -> Counter[tuple[int, int, int]]:
    index = load_index(folder)
    reader = ShardReader(index)
    return Counter(
        (shard, sample, token)
        for shard in range(len(index.shards))
        for sample, length in enumerate(reader.lengths(shard).tolist())
        for token in range(length)
    )


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_token_is_read_once_per_epoch_while_ranks_come_and_go(
    corpus: str, isolate: bool, make_dataset, make_config
) -> None:
    folder = make_dataset(CORPORA[corpus])
    config = make_config(isolate_documents=isolate)
    spans: list[Span] = []
    state = None
    for turn in range(1000):
        streams = ranks(folder, config, (1, 2, 4)[turn % 3])
        if state is not None:
            for stream in streams:
                stream.load_state(state)
        for slot in global_batch(streams).values():
            spans += slot[-1]
        state = union_state(streams)
        if min(cursor[0] for cursor in state.values()) >= 3:
            break
    whole = every_token(folder)
    for epoch in range(3):
        assert tokens_read(spans, epoch) == whole, epoch


@pytest.mark.parametrize("corpus", CORPORA)
def test_any_number_of_ranks_sees_the_same_batches(corpus, make_dataset, make_config) -> None:
    folder = make_dataset(CORPORA[corpus])
    worlds = [ranks(folder, make_config(), world) for world in (1, 2, 4)]
    for _ in range(12):
        first, *others = [global_batch(streams) for streams in worlds]
        assert all(other == first for other in others)


@pytest.mark.parametrize("isolate", [False, True])
def test_resume_from_every_step_continues_identically(isolate, make_dataset, make_config) -> None:
    folder = make_dataset(CORPORA["mixed"])
    config = make_config(isolate_documents=isolate)
    run = ranks(folder, config, 1)
    states, batches = [], []
    for _ in range(20):
        states.append(union_state(run))
        batches.append(global_batch(run))
    for step in range(20):
        again = ranks(folder, config, 2)
        for stream in again:
            stream.load_state(states[step])
        for expected in batches[step : step + 3]:
            assert global_batch(again) == expected


def test_sequences_hold_the_text_their_spans_name(make_dataset, make_config) -> None:
    texts = ["first document", "second, rather longer document " * 3, "third"]
    folder = make_dataset(texts)
    stream = ranks(folder, make_config(), 1, global_batch=1)[0]
    reader, specials = ShardReader(load_index(folder)), stream.tokenizer.specials
    for _ in range(8):
        batch = stream.next_batch()
        ids = np.where(batch.labels[0] == -100, batch.input_ids[0], batch.labels[0])
        assert ids[0] == specials.bos and ids[-1] == specials.eos
        inner = ids[(ids != specials.bos) & (ids != specials.eos)]
        expected = np.concatenate([reader.read(*span[1:]) for span in batch.spans[0]])
        assert inner.tolist() == expected.tolist()


def test_streams_keep_to_the_same_epoch(make_dataset, make_config) -> None:
    # Documents of very uneven length: shares are cut by slots, so nobody runs ahead.
    folder = make_dataset([900, *[3] * 100, 700, *[2] * 100], shard_tokens=300)
    streams = ranks(folder, make_config(), 1)
    for _ in range(400):
        global_batch(streams)
        epochs = [cursor[0] for cursor in union_state(streams).values()]
        assert max(epochs) - min(epochs) <= 1
    assert min(epochs) > 10


def test_every_sequence_has_its_own_number_and_masks(make_dataset, make_config) -> None:
    folder = make_dataset(CORPORA["one giant"])
    config = make_config(seq_len=64)  # so long that no two masks are equal by chance
    stream = ranks(folder, config, 1)[0]
    masks = []
    for number in range(6):
        assert {cursor[3] for cursor in stream.state_dict().values()} == {number}
        masks += [tuple(np.flatnonzero(row != -100)) for row in stream.next_batch().labels]
    assert len(set(masks)) == len(masks) == 24
    held = EvalStream(folder, config, global_batch=4, data_rank=0, data_world=1)
    masks = [tuple(np.flatnonzero(row != -100)) for batch in held for row in batch.labels]
    masks = [mask for mask in masks if mask]  # rows of padding end the last batch
    assert len(set(masks)) == len(masks) > 30


def test_padding_goes_to_a_multiple_and_nowhere_else(make_dataset, make_config) -> None:
    folder = make_dataset(CORPORA["mixed"])
    plain, padded = (
        ranks(folder, make_config(seq_len=30), 1, pad_multiple=p)[0].next_batch() for p in (1, 8)
    )
    assert plain.input_ids.shape == (4, 30) and padded.input_ids.shape == (4, 32)
    assert plain.attention_mask.all()
    assert padded.attention_mask.sum(1).tolist() == [30] * 4
    assert (padded.labels[:, 30:] == -100).all()
    assert padded.spans == plain.spans


def test_isolated_documents_have_segments_and_a_global_token_each(
    make_dataset, make_config
) -> None:
    folder = make_dataset([10] * 9)
    config = make_config(isolate_documents=True)
    batch = ranks(folder, config, 1, global_batch=1)[0].next_batch()
    assert batch.segment_ids is not None
    assert batch.segment_ids[0].tolist() == [0] * 12 + [1] * 12 + [2] * 8
    assert batch.global_positions[0].tolist() == [0, 12, 24]
    specials = ranks(folder, config, 1)[0].tokenizer.specials
    assert batch.input_ids[0, [0, 12, 24]].tolist() == [specials.bos] * 3
    none = make_config(isolate_documents=True, global_tokens="none")
    batch = ranks(folder, none, 1, global_batch=1)[0].next_batch()
    assert batch.global_positions.shape == (1, 0)


def test_micro_batches_are_the_batch_in_parts(make_dataset, make_config) -> None:
    batch = ranks(make_dataset(CORPORA["mixed"]), make_config(), 1)[0].next_batch()
    parts = list(batch.split(2))
    assert [len(part.sample_ids) for part in parts] == [2, 2]
    assert np.array_equal(np.concatenate([p.input_ids for p in parts]), batch.input_ids)
    assert parts[1].sample_ids.tolist() == [2, 3] and parts[1].spans == batch.spans[2:]


def test_state_of_another_run_is_refused_and_changes_nothing(make_dataset, make_config) -> None:
    folder = make_dataset(CORPORA["mixed"])
    stream = ranks(folder, make_config(), 1)[0]
    stream.next_batch()
    before = stream.state_dict()
    for bad in (
        {key: value for key, value in before.items() if key != "3"},
        {**before, "4": [0, 0, 0, 0]},
        {**before, "3": [0, 0, 0, 0]},  # in the share of stream 0
        {**before, "2": [0, 10**6, 0, 0]},
        {**before, "2": [0, 0, 0]},
        {**before, "2": [0, -1, 0, 0]},
        {**before, "2": [*before["2"][:3], 7]},  # of another step
    ):
        with pytest.raises(DataError, match="state"):
            stream.load_state(bad)
        assert stream.state_dict() == before


def test_identity_tells_runs_apart(make_dataset, make_config) -> None:
    first, second = make_dataset([50] * 5), make_dataset([50] * 6, name="other")
    base = ranks(first, make_config(), 1)[0].identity()
    assert ranks(first, make_config(), 2)[1].identity() == base
    assert ranks(second, make_config(), 1)[0].identity() != base
    assert ranks(first, make_config(), 1, seed=6)[0].identity() != base


def test_too_little_text_for_the_batch_is_refused(make_dataset, make_config) -> None:
    folder = make_dataset([3])
    assert len(ranks(folder, make_config(), 1, global_batch=2)[0].next_batch().sample_ids) == 2
    with pytest.raises(DataError, match=r"3 tokens cannot feed 64 .* lower batch.global_batch"):
        ranks(folder, make_config(), 1, global_batch=64)
    with pytest.raises(ValueError, match="global_batch 4 is not a multiple of 3"):
        ranks(folder, make_config(), 3)


@pytest.mark.parametrize("num_batches", [None, 2])
def test_evaluation_reads_everything_once_and_alike_on_any_ranks(
    num_batches, make_dataset, make_config
) -> None:
    folder = make_dataset([100, 37, 250, 4], name="eval")
    seen = []
    for world in (1, 2, 4):
        slots: dict[tuple[int, int], tuple] = {}
        for rank in range(world):
            stream = EvalStream(
                folder, make_config(), global_batch=4, data_rank=rank, data_world=world,
                num_batches=num_batches,
            )  # fmt: skip
            first, second = list(stream), list(stream)
            assert [b.spans for b in first] == [b.spans for b in second]
            for step, batch in enumerate(first):
                assert batch.input_ids.shape == (4 // world, 32)
                for row, slot in enumerate(batch.sample_ids.tolist()):
                    slots[step, slot] = (
                        batch.input_ids[row].tolist(),
                        batch.labels[row].tolist(),
                        batch.spans[row],
                    )
        seen.append(slots)
    assert seen[0] == seen[1] == seen[2]
    spans = [span for _, _, spans in seen[0].values() for span in spans]
    if num_batches is None:
        assert tokens_read(spans, 0) == every_token(folder)
        padding = [labels for ids, labels, spans in seen[0].values() if not spans]
        assert padding and all(set(labels) == {-100} for labels in padding)
    else:
        assert {step for step, _ in seen[0]} == {0, 1}


def test_evaluation_with_another_tokenizer_is_refused(make_dataset, make_config) -> None:
    folder = make_dataset([100], name="eval")
    with pytest.raises(DataError, match="did not make the tokens"):
        EvalStream(
            folder, make_config(), global_batch=1, data_rank=0, data_world=1,
            tokenizer_sha256="0" * 64,
        )  # fmt: skip


def test_a_sequence_of_4096_is_ready_well_below_5_ms(make_dataset, make_config) -> None:
    folder = make_dataset([700] * 300, shard_tokens=50_000)
    stream = ranks(folder, make_config(seq_len=4096), 1, global_batch=1)[0]
    stream.next_batch()
    times = []
    for _ in range(40):
        began = time.thread_time()  # one worker is the caller; what others compute does not count
        stream.next_batch()
        times.append(time.thread_time() - began)
    assert min(times) < 5e-3


def test_every_phase_reads_all_documents_in_an_order_of_its_own(make_dataset, make_config) -> None:
    lengths = [7, 30, 12, 25, 3, 18]
    folder, config = make_dataset(lengths), make_config(seq_len=16)
    orders = set()
    for phase in range(3):
        stream = TrainStream(
            folder, config, seed=seed_of_phase(5, phase), global_batch=1, data_rank=0, data_world=1
        )
        read: list[tuple[int, int]] = []  # document and token, of the first epoch
        while len(read) < sum(lengths):
            for epoch, _, sample, start, stop in stream.next_batch().spans[0]:
                read += [(sample, token) for token in range(start, stop) if epoch == 0]
        assert len(set(read)) == sum(lengths)
        orders.add(tuple(dict.fromkeys(sample for sample, _ in read)))
    assert len(orders) == 3


def test_the_seed_of_a_phase_is_a_pure_function_and_that_of_the_first_is_the_runs() -> None:
    seeds = {(seed, phase): seed_of_phase(seed, phase) for seed in range(20) for phase in range(20)}
    assert all(seeds[seed, 0] == seed for seed in range(20))
    assert len(set(seeds.values())) == 400
    assert all(0 <= value < 2**63 for value in seeds.values())
    # A checkpoint goes on in the order of its phase in any version: the numbers may not change.
    assert seed_of_phase(5, 1) == 3493355584445147628
