"""Data alone, for thousands of steps: memory stays flat, reading is fast, resume costs the same.

    python tests/faults/streams.py                      10,000 steps, about two minutes
    python tests/faults/streams.py --documents long     documents of 20,000 tokens, not 1,000
    python tests/faults/streams.py --untimed --steps 2000 --tokens 400000

It makes a data set of random tokens in a temporary folder. Exit code 1 if a promise is broken:

    memory   resident memory grows by at most 16 MiB from step 1,000 to the last
    reading  tokens in training order, each checked, at 90 % at least of the rate at which tarfile
             reads all members of the same shards one after the other (medians of rounds that take
             turns; both count the bytes of the tokens; files are in the page cache)
    resume   load_state and the first batch read as much at 99 % of the epoch as at 1 % (to a factor
             of 1.5: documents differ in length)

Below "reading" stands what is built on it, without a promise: whole batches without and with masks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from haloformer.configs.schema import DataConfig
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.order import share_of_stream
from haloformer.data_pipeline.prefetch import Prefetcher
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.stream import CausalTrainStream, TrainStream
from haloformer.data_pipeline.tokenizers import ByteTokenizer
from haloformer.data_pipeline.walker import Epochs, Walker

GLOBAL_BATCH = 8
SETTLED = 1000  # steps until caches are full
GROWTH_LIMIT = 16 << 20
READING_LIMIT = 0.9
RESUME_LIMIT = 1.5  # documents differ in length
NUM_RESUMES = 8
LENGTHS = {"short": 1000, "long": 20_000}  # medians; documents differ by a factor of ten
MIB = 1 << 20
Say = Callable[[str], None]


def write_data(folder: Path, num_tokens: int, median: int) -> None:
    """Documents of log-normal lengths in shards of about 2 M tokens."""
    draw, left, number = np.random.default_rng(0), num_tokens, 0
    with DatasetWriter(folder, ByteTokenizer(), min(2_000_000, num_tokens // 8)) as writer:
        while left > 0:
            length = int(min(max(draw.lognormal(np.log(median), 0.8), 1), left))
            writer.add("x", draw.integers(97, 123, length), f"document {number}")
            left, number = left - length, number + 1
        writer.close()


def config_of(folder: Path, seq_len: int, workers: int = 1) -> DataConfig:
    return DataConfig(train=str(folder), eval=str(folder), seq_len=seq_len, workers=workers)


def open_stream(
    kind: type[TrainStream], folder: Path, seq_len: int, workers: int = 1
) -> TrainStream:
    return kind(
        folder, config_of(folder, seq_len, workers),
        seed=1, global_batch=GLOBAL_BATCH, data_rank=0, data_world=1,
    )  # fmt: skip


def check_memory(stream, steps: int, say: Say) -> bool:
    """Run a stream and compare resident memory after it has settled and at the end."""
    process = psutil.Process()
    settled = 0
    for step in range(1, steps + 1):
        stream.next_batch()
        if step == min(SETTLED, steps // 2):
            settled = process.memory_info().rss
            say(f"memory: step {step}: {settled / MIB:.1f} MiB")
    growth = process.memory_info().rss - settled
    say(
        f"memory: step {steps}: {growth / MIB:+.1f} MiB (limit {GROWTH_LIMIT / MIB:.0f}), "
        f"epoch {min(cursor[0] for cursor in stream.state_dict().values())}"
    )
    return growth <= GROWTH_LIMIT


def read_tar(folder: Path) -> int:
    """All members of all shards; returns the bytes of their tokens."""
    num_bytes = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                content = file.read()
                if member.name.endswith(".npy"):
                    num_bytes += len(content)
    return num_bytes


def read_raw(folder: Path) -> int:
    """The shards as plain files."""
    num_bytes = 0
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            while chunk := file.read(MIB):
                num_bytes += len(chunk)
    return num_bytes


def read_epoch(folder: Path, seq_len: int) -> int:
    """Every token of an epoch in the order of training, read and checked, but in no batch."""
    index = load_index(folder)
    reader = ShardReader(index)
    epochs = Epochs(
        reader, seed=1, shuffle_block=1, num_streams=GLOBAL_BATCH, streams=range(GLOBAL_BATCH)
    )
    walkers = [
        Walker(epochs, reader, stream, skip_corrupt=False, num_epochs=1)
        for stream in range(GLOBAL_BATCH)
    ]
    num_bytes = 0
    while walkers:
        for walker in tuple(walkers):
            piece = walker.take(seq_len)
            if piece is None:
                walkers.remove(walker)
            else:
                num_bytes += reader.read(*piece.span[1:]).nbytes
    assert num_bytes == index.num_tokens * np.dtype(index.dtype).itemsize
    reader.close()
    return num_bytes


def make_batches(kind: type[TrainStream], folder: Path, seq_len: int) -> int:
    """An epoch of whole batches; returns the stored bytes of their tokens."""
    stream = open_stream(kind, folder, seq_len)
    num_bytes = 0
    itemsize = np.dtype(load_index(folder).dtype).itemsize
    while min(cursor[0] for cursor in stream.state_dict().values()) == 0:
        num_bytes += stream.next_batch().num_tokens * itemsize
    stream.close()
    return num_bytes


def check_speed(folder: Path, seq_len: int, rounds: int, say: Say) -> bool:
    """Compare rates; the readers take turns, so that a busy machine is busy for all."""
    ways: dict[str, Callable[[], int]] = {
        "tar, member by member": lambda: read_tar(folder),
        "tar, as a plain file": lambda: read_raw(folder),
        "reading, in training order": lambda: read_epoch(folder, seq_len),
        "batches without masks": lambda: make_batches(CausalTrainStream, folder, seq_len),
        "batches with masks": lambda: make_batches(TrainStream, folder, seq_len),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            num_bytes = way()
            rates[name].append(num_bytes / MIB / (time.perf_counter() - start))
    plain = rates["tar, member by member"]
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, plain, strict=True))
        say(f"speed: {name}: {statistics.median(found):.0f} MiB/s, {ratio:.2f} of the tar")
        if name.startswith("reading"):
            reached = ratio
    say(f"speed: machine load {os.getloadavg()[0]:.1f}, one thread each")
    return reached >= READING_LIMIT


def state_at(folder: Path, share: float, seq_len: int) -> dict[str, list[int]]:
    """The state of a run whose streams have read so much of their part of epoch 0."""
    index = load_index(folder)
    reader = ShardReader(index)
    streams = range(GLOBAL_BATCH)
    epochs = Epochs(reader, seed=1, shuffle_block=1, num_streams=GLOBAL_BATCH, streams=streams)
    order = epochs.order(0)
    cuts = [share_of_stream(stream, GLOBAL_BATCH, order.num_slots) for stream in streams]
    points = order.points([first + int(share * (last - first)) for first, last in cuts])
    step = int(share * order.num_slots / GLOBAL_BATCH / seq_len)
    reader.close()
    return {str(stream): [0, *points[stream], step] for stream in streams}


def check_resume(folder: Path, seq_len: int, say: Say) -> bool:
    """Count what loading a state and the first batch after it touch, at both ends of an epoch."""
    opened: list[str] = []
    watching = [True]  # audit hooks stay for good

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and watching[0]:
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    read_at = []
    for end, share in (("first", 0.01), ("last", 0.99)):
        tables = documents = num_bytes = 0
        seconds = []
        for turn in range(NUM_RESUMES):
            state = state_at(folder, share + (0.5 - share) * turn / 1000, seq_len)
            stream = open_stream(TrainStream, folder, seq_len)
            opened.clear()
            before, start = bytes_read(), time.perf_counter()
            stream.load_state(state)
            batch = stream.next_batch()
            seconds.append(time.perf_counter() - start)
            num_bytes += bytes_read() - before
            documents += len({span[1:3] for spans in batch.spans for span in spans})
            tables += sum(name.endswith(".offsets") for name in opened)
            stream.close()
        read_at.append(num_bytes)
        say(
            f"resume: in the {end} hundredth of the epoch, mean of {NUM_RESUMES}: "
            f"{tables / NUM_RESUMES:.1f} tables, {documents / NUM_RESUMES:.1f} documents, "
            f"{num_bytes / NUM_RESUMES / 1024:.0f} KiB, {1e3 * statistics.median(seconds):.1f} ms"
        )
    watching[0] = False
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    say(f"resume: the shards have {total / 1024:.0f} KiB")
    return max(read_at) <= RESUME_LIMIT * min(read_at)


def bytes_read() -> int:
    """What this process has asked the kernel for, from the cache or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "rchar":
            return int(value)
    raise AssertionError("no rchar in /proc/self/io")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", choices=LENGTHS, default="short")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="size of the data set")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--untimed", action="store_true", help="leave the speed out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder, options.tokens, LENGTHS[options.documents])
        kept = {"resume": check_resume(folder, options.seq_len, print)}
        if not options.untimed:
            kept["reading"] = check_speed(folder, options.seq_len, options.rounds, print)
        stream = Prefetcher(open_stream(TrainStream, folder, options.seq_len, workers=2), 2)
        kept["memory"] = check_memory(stream, options.steps, print)
        stream.close()
    for name, holds in kept.items():
        print(f"{name}: {'holds' if holds else 'BROKEN'}")
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
