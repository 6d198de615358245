"""Shards behind real HTTP and S3 servers give the batches of the same shards on disk."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest

from haloformer.configs.schema import CacheConfig
from haloformer.data_pipeline.cache import BlockCache
from haloformer.data_pipeline.data_cli import data_sets
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.reader import ShardReader, check_sizes, verify
from haloformer.data_pipeline.remote import RemoteError, RemoteFiles, split_address
from haloformer.data_pipeline.retry import RetryPolicy
from haloformer.data_pipeline.store import RemoteStore, open_store
from haloformer.data_pipeline.stream import TrainStream
from servers import FileServer, s3_server

QUICK = RetryPolicy(attempts=4, first_wait_s=0.001, longest_wait_s=0.002)
LENGTHS = [700, 30, 2500, 11, 900, 64, 5, 1200, 333, 40]
BLOCK = 512


@pytest.fixture
def data(make_dataset) -> Path:
    return make_dataset(LENGTHS, shard_tokens=2000)


@pytest.fixture
def web(data):
    with FileServer(data.parent) as server:
        yield server


def remote_store(url: str, cache: Path, limit: int = 1 << 20) -> RemoteStore:
    files = RemoteFiles(split_address(url), QUICK)
    return RemoteStore(files, BlockCache(cache, limit), BLOCK)


def documents(index) -> list[bytes]:
    reader = ShardReader(index)
    return [
        reader.read(shard, sample, 0, length).tobytes()
        for shard in range(len(index.shards))
        for sample, length in enumerate(reader.lengths(shard).tolist())
    ]


def batches(address, config) -> list[np.ndarray]:
    stream = TrainStream(address, config, seed=5, global_batch=2, data_rank=0, data_world=1)
    made = [stream.next_batch() for _ in range(40)]  # two epochs and a half
    stream.close()
    return [array for batch in made for array in (batch.input_ids, batch.labels)]


def test_batches_over_http_and_s3_are_those_of_the_disk(
    data: Path, web, make_config, tmp_path: Path, monkeypatch
) -> None:
    config = make_config(seq_len=256, cache={"path": str(tmp_path / "cache")})
    expected = batches(data, config)
    assert all(map(np.array_equal, batches(f"file:{data}", config), expected))
    assert all(map(np.array_equal, batches(f"{web.url}/train", config), expected))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server("corpus") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        client = boto3.client("s3")
        for file in data.rglob("*.*"):
            client.upload_file(str(file), "corpus", f"wiki/{file.relative_to(data)}")
        client.close()
        other = make_config(seq_len=256, cache={"path": str(tmp_path / "other")})
        assert all(map(np.array_equal, batches("s3://corpus/wiki", other), expected))
        check_sizes(load_index("s3://corpus/wiki", other.cache))
        assert verify("s3://corpus/wiki").sha256 == load_index(data).sha256
        with pytest.raises(DataError, match=r"s3://corpus/elsewhere: holds no index\.json"):
            load_index("s3://corpus/elsewhere", other.cache)


def test_a_document_costs_its_blocks_once_and_a_second_reader_reads_the_cache(
    data: Path, web, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    index = load_index(remote_store(f"{web.url}/train", cache))
    assert documents(index) == documents(load_index(data))
    size = sum(shard.size for shard in index.shards)
    first = web.ranges_of(".tar")
    assert len(first) == len(set(first)) <= -(-size // BLOCK) + len(index.shards)
    again = load_index(remote_store(f"{web.url}/train", cache))
    assert documents(again) == documents(load_index(data))
    assert web.ranges_of(".tar") == first
    # One document of 2,500 tokens (5,000 bytes) lies in at most 11 blocks of 512.
    alone = load_index(remote_store(f"{web.url}/train", tmp_path / "empty"))
    ShardReader(alone).read(1, 0, 100, 110)
    assert len(web.ranges_of(".tar")) - len(first) <= 11


def test_ranks_of_a_host_fetch_a_block_once(web, tmp_path: Path) -> None:
    indexes = [load_index(remote_store(f"{web.url}/train", tmp_path / "c")) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(documents, indexes))
    assert read[0] == read[1] == read[2] == read[3]
    ranges = [request for request in web.requests if request[1].endswith(".tar")]
    assert len(ranges) == len(set(ranges))


def test_a_server_that_fails_for_a_while_is_asked_again(data: Path, web, tmp_path: Path) -> None:
    index = load_index(remote_store(f"{web.url}/train", tmp_path / "cache"))
    reader = ShardReader(index)
    reader.lengths(0)
    web.faults.extend([503, "drop", 429])
    local = ShardReader(load_index(data))
    assert np.array_equal(reader.read(0, 0, 0, 700), local.read(0, 0, 0, 700))
    assert not web.faults


def test_a_server_that_stays_away_is_no_corrupt_sample(data: Path, tmp_path: Path) -> None:
    with FileServer(data.parent) as server:
        index = load_index(remote_store(f"{server.url}/train", tmp_path / "cache"))
        reader = ShardReader(index, "skip")
        reader.lengths(0)
        server.faults.extend([500] * 4)
        with pytest.raises(RemoteError, match=r"shard-000000\.tar: no answer after 4 attempts \(C"):
            reader.check(0, 0)
        before = len(server.requests)
        server.faults.append(403)
        with pytest.raises(RemoteError, match=r"refused .*403.*credentials"):
            reader.check(0, 0)
        assert len(server.requests) == before + 1  # asked once
        (data / "shard-000000.tar").unlink()
        before = len(server.requests)
        with pytest.raises(CorruptSampleError, match="cannot be read"):
            reader.check(0, 0)
        assert len(server.requests) == before + 1
    with pytest.raises(RemoteError, match=r"no answer after 4 attempts .*is up and reachable"):
        reader.check(0, 1)


def test_a_server_without_ranges_is_refused_at_once(data: Path, tmp_path: Path) -> None:
    with (
        FileServer(data, takes_ranges=False) as server,
        pytest.raises(RemoteError, match=r"ignores Range requests.*nginx"),
    ):
        load_index(remote_store(server.url, tmp_path / "cache"))
    assert {name for _, name, _ in server.requests} == {"/index.json"}


def test_damage_in_the_cache_is_fetched_again(data: Path, web, tmp_path: Path) -> None:
    cache, url = tmp_path / "cache", f"{web.url}/train"
    expected = documents(load_index(remote_store(url, cache)))
    blocks = [path for path in cache.glob("??/*") if path.is_file()]
    flipped = bytearray(blocks[0].read_bytes())
    flipped[40] ^= 1
    blocks[0].write_bytes(flipped)
    blocks[1].write_bytes(blocks[1].read_bytes()[:20])
    blocks[2].write_bytes(blocks[3].read_bytes())  # sound, but another's
    before = len(web.ranges_of(""))
    assert documents(load_index(remote_store(url, cache))) == expected
    assert len(web.ranges_of("")) - before == 3 + 1  # and one byte, to see that ranges are served


@pytest.mark.parametrize("instead", ["nothing", "files"])
def test_a_cache_that_goes_away_is_told_once_and_costs_no_document(
    instead: str, data: Path, web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody tidies up ~/.cache while ranks train."""
    cache = tmp_path / "cache"
    index = load_index(remote_store(f"{web.url}/train", cache))
    expected = documents(load_index(data))
    assert documents(index) == expected
    index.store.close()  # blocks in memory would hide what is missing
    folders = [path for path in cache.iterdir() if path.is_dir()]
    shutil.rmtree(cache)
    if instead == "files":
        cache.mkdir()
        for path in folders:
            path.touch()
    assert documents(index) == expected
    assert len([line for line in caplog.messages if str(cache) in line]) == 1


def test_what_was_cached_wrong_is_fetched_again(data: Path, web, tmp_path: Path) -> None:
    """Bad bytes that came from the server itself, for a while, do not stay."""
    shard = data / "shard-000000.tar"
    sound = shard.read_bytes()
    index = load_index(remote_store(f"{web.url}/train", tmp_path / "cache"))
    expected = documents(load_index(data))
    shard.write_bytes(bytes(len(sound)))
    with pytest.raises(CorruptSampleError, match="wrong crc32"):
        documents(index)
    shard.write_bytes(sound)
    assert documents(index) == expected


def test_annotations_over_http_are_those_of_the_disk_and_heal_like_tokens(
    make_examples, tmp_path: Path
) -> None:
    folder = make_examples("questions", 8)

    def notes(index) -> list[dict]:
        reader = ShardReader(index)
        sizes = [info.num_samples for info in index.shards]
        return [reader.note(shard, n) for shard, size in enumerate(sizes) for n in range(size)]

    expected, shard = notes(load_index(folder)), folder / "shard-000000.tar"
    assert [entry["note"]["id"] for entry in expected] == [f"e{n}" for n in range(8)]
    sound = shard.read_bytes()
    with FileServer(folder.parent) as server:
        index = load_index(remote_store(f"{server.url}/questions", tmp_path / "cache"))
        shard.write_bytes(bytes(len(sound)))
        with pytest.raises(CorruptSampleError, match="sample 0: the annotation is damaged"):
            notes(index)
        shard.write_bytes(sound)
        assert notes(index) == expected
        assert verify(f"{server.url}/questions").content == "questions"


def test_the_cache_never_passes_its_limit_and_keeps_what_is_used(tmp_path: Path) -> None:
    limit, block = 50_000, b"x" * 1000

    def in_use() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("??/*"))

    def fill(worker: int) -> int:
        cache, most = BlockCache(tmp_path, limit), 0
        for number in range(150):
            cache.put(BlockCache.key_of(worker, number), block)
            # Other workers add between the files of one count, but never past the limit.
            with cache._ledger():
                most = max(most, in_use())
            assert cache.get(favourite) == block
        return most

    favourite = BlockCache.key_of("favourite")
    BlockCache(tmp_path, limit).put(favourite, block)
    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(fill, range(3))) <= limit
    assert in_use() > 0.8 * limit
    small = BlockCache(tmp_path, 10_000)  # a lower limit holds at once
    assert in_use() <= 10_000
    small.put("0" * 64, b"y" * 20_000)
    assert small.get("0" * 64) is None


def test_a_ledger_that_is_lost_is_counted_anew(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 5000)
    for number in range(4):
        cache.put(BlockCache.key_of(number), b"x" * 1000)
        (tmp_path / "ledger").write_bytes(b"nonsense")
    cache.put(BlockCache.key_of(9), b"x" * 1000)
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 5000


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ftp://host/data", "no data is read by ftp://"),
        ("https://me:secret@host/data", r"https://host/data: an address .*\.netrc"),
        ("https://:secret@host/data", r"https://host/data: an address .*\.netrc"),
        ("https://host/data#secret", r"https://host/data: an address .*\.netrc"),
        ("http://host/data?token=1", "nothing more"),
        ("s3:///data", "scheme://host/folder"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(address: str, told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        open_store(address)
    assert "secret" not in str(error.value)


def test_a_cache_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache: .*data\.cache\.path"):
        open_store("http://host/data", CacheConfig(path=str(tmp_path / "file" / "cache")))


def test_a_missing_or_cut_remote_shard_is_found_before_a_run(
    data: Path, web, tmp_path: Path
) -> None:
    index = load_index(remote_store(f"{web.url}/train", tmp_path / "cache"))
    check_sizes(index)
    os.truncate(data / "shard-000001.tar", 4096)
    with pytest.raises(DataError, match=r"/train/shard-000001\.tar: the shard has 4096 bytes"):
        check_sizes(index)
    with pytest.raises(CorruptSampleError, match="ends before"):
        ShardReader(index).check(1, 0)
    (data / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="the shard is missing"):
        check_sizes(index)


def test_verify_finds_remote_data_sets_and_damage(data: Path, web) -> None:
    assert data_sets(web.url) == [f"{web.url}/train"]
    assert data_sets(f"{web.url}/train") == [f"{web.url}/train"]
    assert verify(f"{web.url}/train").num_samples == len(LENGTHS)
    shard = data / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"http.*shard-000000\.tar: .*wrong sha256"):
        verify(f"{web.url}/train")
    (data / "tokenizer" / "tokenizer_kind.json").unlink()
    with pytest.raises(DataError, match=r"http.*/tokenizer/tokenizer_kind\.json: no such file"):
        verify(f"{web.url}/train")
