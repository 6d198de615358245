"""Prefetch and workers: the batches, states and errors of the bare stream, only earlier."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import load_index, load_table
from haloformer.data_pipeline.prefetch import Prefetcher
from haloformer.data_pipeline.seq2seq import PairTrainStream
from haloformer.data_pipeline.stream import CausalTrainStream, TrainStream
from haloformer.data_pipeline.workers import Workers

STREAMS = {"masked": TrainStream, "causal": CausalTrainStream, "pairs": PairTrainStream}
PLACE = {"seed": 5, "global_batch": 6, "data_rank": 1, "data_world": 2}
WAIT = 60.0  # seconds until something that never comes is a failure


@pytest.fixture(params=STREAMS)
def open_stream(request, make_dataset, make_pairs, make_config):
    """Opens one kind of stream; a few of its samples are damaged and skipped."""
    if request.param == "pairs":
        folder, changes = make_pairs(30), {"target_len": 16}
    else:
        folder, changes = make_dataset([40, 3, 120, 1, 17, 64, 5, 90, 33, 2, 250, 8]), {}
    for sample in (1, 2):
        damage(folder, 0, sample)

    def open_one(**options):
        config = make_config(on_corrupt="skip", **changes, **options)
        return STREAMS[request.param](folder, config, **PLACE)

    return open_one


def damage(folder: Path, shard: int, sample: int) -> None:
    index = load_index(folder)
    path = folder / index.shards[shard].name
    content = bytearray(path.read_bytes())
    content[load_table(index, shard)[sample]["offset"]] ^= 1
    path.write_bytes(content)


def same(a, b) -> bool:
    def equal(one, other) -> bool:
        return (
            np.array_equal(one, other) and one.dtype == other.dtype
            if isinstance(one, np.ndarray)
            else one == other
        )

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def union(stream, other) -> dict[str, list[int]]:
    """The state of the run, from both of its ranks."""
    return other.state_dict() | stream.state_dict()


@pytest.mark.parametrize(("depth", "workers"), [(1, 1), (3, 2), (2, 7)])
def test_batches_and_states_are_those_of_the_bare_stream(open_stream, depth, workers) -> None:
    bare, ahead = open_stream(), Prefetcher(open_stream(workers=workers), depth)
    for _ in range(25):
        assert ahead.state_dict() == bare.state_dict()
        assert ahead.num_skipped == bare.num_skipped
        assert same(ahead.next_batch(), bare.next_batch())
    assert bare.num_skipped > 0
    assert ahead.identity() == bare.identity() and ahead.facts == bare.facts
    ahead.close()
    bare.close()


def test_resume_continues_after_the_last_batch_given(make_dataset, make_config) -> None:
    folder, config = make_dataset([40, 3, 120, 1, 17, 64, 5, 90]), make_config(workers=2)
    place = {**PLACE, "data_rank": 0, "data_world": 1}
    first = Prefetcher(TrainStream(folder, config, **place), 3)
    again = Prefetcher(TrainStream(folder, config, **place), 2)
    again.next_batch()  # so that it has made batches that must not be given
    for _ in range(6):
        first.next_batch()
    again.load_state(first.state_dict())
    for _ in range(6):
        assert again.state_dict() == first.state_dict()
        assert same(again.next_batch(), first.next_batch())
    with pytest.raises(DataError, match="holds 1 streams"):
        again.load_state({"0": [0, 0, 0, 0]})
    assert same(again.next_batch(), first.next_batch())
    first.close()
    again.close()


class Observed(TrainStream):
    """Says when a batch was made."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.made = threading.Semaphore(0)

    def next_batch(self):
        batch = super().next_batch()
        self.made.release()
        return batch


@pytest.fixture
def observed(make_dataset, make_config) -> Observed:
    return Observed(make_dataset([40, 3, 120, 1, 17]), make_config(), **PLACE)


def test_the_next_batch_is_made_while_the_last_is_used(observed) -> None:
    ahead = Prefetcher(observed, 2)
    ahead.next_batch()
    # Nobody asks for a batch, and two more are made.
    assert all(observed.made.acquire(timeout=WAIT) for _ in range(1 + 2))
    ahead.close()


def test_never_more_than_depth_batches_are_ahead(observed) -> None:
    ahead = Prefetcher(observed, 2)
    for _ in range(3):
        ahead.next_batch()
    assert all(observed.made.acquire(timeout=WAIT) for _ in range(3 + 2))
    assert not observed.made.acquire(timeout=0.3)  # one more would take a millisecond
    ahead.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_raised_in_the_place_of_its_batch(workers, make_dataset, make_config) -> None:
    folder = make_dataset([20] * 100)
    place = {**PLACE, "data_rank": 0, "data_world": 1}
    sound = TrainStream(folder, make_config(), **place)
    batches = [sound.next_batch() for _ in range(5)]
    span = next(span for span in batches[4].spans[2] if span.start == 0)  # not seen before
    damage(folder, span.shard, span.sample)
    ahead = Prefetcher(TrainStream(folder, make_config(workers=workers), **place), 3)
    for batch in batches[:4]:
        before = ahead.state_dict()
        assert same(ahead.next_batch(), batch)
    after = ahead.state_dict()
    for _ in range(2):
        with pytest.raises(CorruptSampleError, match=f"sample {span.sample}"):
            ahead.next_batch()
        assert ahead.state_dict() == after
    ahead.load_state(before)
    assert same(ahead.next_batch(), batches[3])
    with pytest.raises(CorruptSampleError):
        ahead.next_batch()
    ahead.close()


def test_an_error_waits_until_all_workers_rest() -> None:
    workers, both = Workers(2, [0, 1]), threading.Barrier(2)
    rests = []

    def make(slot: int) -> None:
        both.wait(WAIT)
        if slot == 0:
            raise ValueError("slot 0")
        rests.append(sum(range(2_000_000)))

    with pytest.raises(ValueError, match="slot 0"):
        workers.map(make)
    assert rests
    workers.close()


@pytest.fixture
def prefetch_threads() -> Callable[[], list[threading.Thread]]:
    """Lists the threads of this test's streams; one that another test left is not ours."""
    others = set(threading.enumerate())
    names = ("prefetch", "data-")
    return lambda: [t for t in set(threading.enumerate()) - others if t.name.startswith(names)]


def test_closing_ends_the_threads_even_when_the_queue_is_full(prefetch_threads, observed) -> None:
    ahead = Prefetcher(observed, 1)
    ahead.next_batch()
    assert all(observed.made.acquire(timeout=WAIT) for _ in range(2))
    assert prefetch_threads()
    ahead.close()
    ahead.close()
    assert not prefetch_threads()


def test_a_stream_that_nobody_holds_ends_its_threads(
    make_dataset, make_config, prefetch_threads
) -> None:
    folder = make_dataset([40, 3, 120, 1, 17])
    ahead = Prefetcher(TrainStream(folder, make_config(workers=2), **PLACE), 1)
    ahead.next_batch()
    assert len(prefetch_threads()) == 3
    threads = prefetch_threads()
    del ahead
    gc.collect()
    for thread in threads:
        thread.join(WAIT)
    assert not prefetch_threads()


def test_a_stream_that_is_collected_by_its_own_thread_ends_it(
    make_dataset, make_config, prefetch_threads
) -> None:
    holders: list[Prefetcher] = []
    given = threading.Event()

    class Dropping(TrainStream):
        num_made = 0

        def next_batch(self):
            self.num_made += 1
            if self.num_made == 2:
                given.wait(WAIT)
                holders.clear()
                gc.collect()
            return super().next_batch()

    stream = Dropping(make_dataset([40, 3, 120, 1, 17]), make_config(), **PLACE)
    holders.append(Prefetcher(stream, 3))
    holders[0].next_batch()
    threads = prefetch_threads()
    given.set()
    for thread in threads:
        thread.join(WAIT)
    assert len(threads) == 1 and not prefetch_threads()
    assert stream.num_made == 2 and not holders


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise RuntimeError('trainer')"])
def test_a_process_ends_at_once_whatever_its_stream_does(end, make_dataset, make_config) -> None:
    program = f"""
import sys
from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.prefetch import Prefetcher
from haloformer.data_pipeline.stream import TrainStream
config = DataConfig(train="train", eval="eval", seq_len=32, workers=2)
stream = TrainStream(sys.argv[1], config, **{PLACE})
ahead = Prefetcher(stream, 1)
ahead.next_batch()
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(make_dataset([40, 3, 120, 1, 17]))],
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1), done.stderr
    last = done.stderr.strip().splitlines()[-1:]
    assert last == (["RuntimeError: trainer"] if "RuntimeError" in end else [])
