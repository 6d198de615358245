from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import pytest

from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import load_index, load_table
from haloformer.data_pipeline.reader import ShardReader, verify
from haloformer.data_pipeline.stream import TrainStream

LENGTHS = [120, 80, 150, 60, 90, 200, 110]


def train(folder: Path, config, world: int = 1) -> list[TrainStream]:
    return [
        TrainStream(folder, config, seed=1, global_batch=2, data_rank=r, data_world=world)
        for r in range(world)
    ]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def damage_sample(folder: Path, shard: int, sample: int) -> Path:
    index = load_index(folder)
    record = load_table(index, shard)[sample]
    path = folder / index.shards[shard].name
    flip(path, int(record["offset"]) + int(record["num_tokens"]))
    return path


def read_epochs(streams: list[TrainStream], num_epochs: int) -> list[tuple[int, int]]:
    seen = []
    while min(c[0] for s in streams for c in s.state_dict().values()) < num_epochs:
        for stream in streams:
            seen += [
                (span.shard, span.sample)
                for spans in stream.next_batch().spans
                for span in spans
                if span.epoch < num_epochs
            ]
    return seen


def test_verify_passes_sound_data_and_reports_progress(make_dataset) -> None:
    folder = make_dataset(LENGTHS)
    calls: list[tuple[int, int]] = []
    assert verify(folder, lambda *call: calls.append(call)).num_samples == len(LENGTHS)
    assert calls[-1][0] == calls[-1][1] == sum(p.stat().st_size for p in folder.glob("*.tar"))


@pytest.mark.parametrize("suffix", ["tar", "offsets"])
def test_verify_names_the_file_with_a_flipped_byte(suffix: str, make_dataset) -> None:
    folder = make_dataset(LENGTHS)
    path = sorted(folder.glob(f"*.{suffix}"))[-1]
    flip(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=f"{path.name}: .*damaged.*; restore"):
        verify(folder)


def test_a_flipped_byte_stops_training_naming_file_sample_and_remedy(
    make_dataset, make_config
) -> None:
    folder = make_dataset(LENGTHS)
    path = damage_sample(folder, 1, 0)
    with pytest.raises(CorruptSampleError) as caught:
        read_epochs(train(folder, make_config()), 1)
    message = str(caught.value)
    assert f"{path}: sample 0: the tokens are damaged" in message
    assert "data.on_corrupt=skip" in message and "\n" not in message


@pytest.mark.parametrize("change", ["cut", "longer", "missing"])
def test_a_shard_of_the_wrong_size_is_refused_before_training(
    change: str, make_dataset, make_config
) -> None:
    folder = make_dataset(LENGTHS)
    path = folder / "shard-000001.tar"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-2000] if change == "cut" else content + b"\0" * 512)
    with pytest.raises(DataError, match=r"shard-000001\.tar: the shard "):
        train(folder, make_config())


def test_skipping_passes_over_the_damaged_sample_alone_and_counts_it(
    make_dataset, make_config
) -> None:
    folder = make_dataset(LENGTHS)
    whole = set(read_epochs(train(folder, make_config()), 1))
    damage_sample(folder, 1, 0)
    for world in (1, 2):
        streams = train(folder, make_config(on_corrupt="skip"), world)
        assert set(read_epochs(streams, 1)) == whole - {(1, 0)}
        assert sum(stream.num_skipped for stream in streams) >= 1


def test_too_many_open_files_are_no_damage_to_a_sample(make_dataset) -> None:
    with contextlib.closing(ShardReader(load_index(make_dataset(LENGTHS)))) as reader:
        assert reader.lengths(0)[0] > 0
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        last = os.open(os.devnull, os.O_RDONLY)  # no number below it is free
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))
            with pytest.raises(DataError, match="Too many open files") as caught:
                reader.check(0, 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(last)
        assert not isinstance(caught.value, CorruptSampleError)  # which would be skipped
        reader.check(0, 0)


@pytest.mark.parametrize("change", ["cut", "missing"])
def test_skipping_reads_what_a_cut_shard_still_holds(change, make_dataset, make_config) -> None:
    folder = make_dataset(LENGTHS, shard_tokens=500)
    index = load_index(folder)
    path = folder / index.shards[0].name
    last = index.shards[0].num_samples - 1
    whole = set(read_epochs(train(folder, make_config()), 1))
    if change == "missing":
        path.unlink()
        lost = {key for key in whole if key[0] == 0}
    else:
        path.write_bytes(path.read_bytes()[: int(load_table(index, 0)[last]["offset"]) + 10])
        lost = {(0, last)}
    assert lost and lost < whole
    assert set(read_epochs(train(folder, make_config(on_corrupt="skip")), 1)) == whole - lost


def test_damage_everywhere_ends_with_an_error_not_a_hang(make_dataset, make_config) -> None:
    folder = make_dataset(LENGTHS, shard_tokens=500)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="every document of stream 0 is damaged"):
        train(folder, make_config(on_corrupt="skip"))[0].next_batch()


def test_a_damaged_table_stops_even_when_samples_are_skipped(make_dataset, make_config) -> None:
    folder = make_dataset(LENGTHS)
    flip(folder / "shard-000000.offsets", 3)
    with pytest.raises(DataError, match=r"shard-000000.offsets: the offset table is damaged"):
        read_epochs(train(folder, make_config(on_corrupt="skip")), 1)


def num_open_below(folder: Path) -> int:
    """Files in it that this process holds open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return sum(target.startswith(f"{folder}/") for target in targets)


def test_open_files_are_bounded(make_dataset, make_config) -> None:
    folder = make_dataset([30] * 80, shard_tokens=30)
    assert len(load_index(folder).shards) == 80
    stream = train(folder, make_config())[0]
    read_epochs([stream], 2)
    assert 0 < num_open_below(folder) <= 32
    stream.close()
    assert num_open_below(folder) == 0
