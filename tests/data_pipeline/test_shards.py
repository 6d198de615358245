from __future__ import annotations

import gc
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from haloformer.data_pipeline import index as index_module
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import load_index, load_table
from haloformer.data_pipeline.reader import ShardReader, verify
from haloformer.data_pipeline.tokenizers import ByteTokenizer, train_bpe

TEXTS = ["short", "Grüße " * 30, "x" * 150, "naïve", "last one"]


def rewrite_index(folder: Path, change) -> None:
    """Change the index and make its own hash right again, as an attacker would."""
    path = folder / "index.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    content["sha256"] = index_module._own_hash(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves tars open
def test_plain_webdataset_reads_the_shards(make_dataset) -> None:
    folder = make_dataset(TEXTS)
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    gc.collect()
    tokenizer = ByteTokenizer()
    assert [tokenizer.decode(sample["npy"].tolist()) for sample in samples] == TEXTS
    assert [sample["json"]["num_bytes"] for sample in samples] == [len(t.encode()) for t in TEXTS]
    assert [sample["json"]["source"] for sample in samples][1] == "document 1"
    assert len({sample["__key__"] for sample in samples}) == len(TEXTS)


def test_seeking_finds_what_reading_through_finds(make_dataset) -> None:
    folder = make_dataset(TEXTS)
    index = load_index(folder)
    reader, tokenizer = ShardReader(index), index.load_tokenizer()
    texts = [
        tokenizer.decode(reader.read(shard, sample, 0, length).tolist())
        for shard in range(len(index.shards))
        for sample, length in enumerate(reader.lengths(shard).tolist())
    ]
    assert texts == TEXTS
    assert reader.read(0, 0, 1, 4).tolist() == tokenizer.encode("hor").tolist()


def test_long_documents_are_read_in_part_without_being_held(make_dataset) -> None:
    length = (3 << 20) // 2 + 11
    folder = make_dataset([length, 5], shard_tokens=1 << 30)
    reader = ShardReader(load_index(folder))
    with tarfile.open(folder / "shard-000000.tar") as archive:
        member = archive.extractfile("000000000000.npy")
        assert member is not None
        whole = np.load(io.BytesIO(member.read()))
    assert len(whole) == length
    for start, stop in ((0, 10), (length - 7, length), (1_000_000, 1_004_096)):
        assert np.array_equal(reader.read(0, 0, start, stop), whole[start:stop])
    assert not reader._cache


def test_totals_are_those_of_the_text(make_dataset) -> None:
    index = load_index(make_dataset(TEXTS))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (index.num_samples, index.num_tokens, index.num_bytes) == (5, num_bytes, num_bytes)
    assert index.bytes_per_token == 1.0
    assert index.characters_per_token == sum(map(len, TEXTS)) / num_bytes


def test_the_same_documents_make_the_same_bytes(make_dataset) -> None:
    first, second = make_dataset(TEXTS), make_dataset(TEXTS, name="again")
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file())
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_a_large_vocabulary_is_stored_in_four_bytes(make_dataset) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 1 << 17

    folder = make_dataset(TEXTS, tokenizer=Wide())
    index = load_index(folder)
    assert index.dtype == "<i4"
    assert ShardReader(index).read(0, 0, 0, 5).tolist() == Wide().encode("short").tolist()


def test_a_percent_sign_in_the_path_is_no_format(make_dataset) -> None:
    assert load_index(make_dataset(TEXTS, name="100%d")).num_samples == 5


def test_a_folder_without_index_is_no_data_set(make_dataset) -> None:
    folder = make_dataset(TEXTS)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"holds no index.json.*haloformer prepare"):
        load_index(folder)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "shard-000000.tar/../x.tar", "a\nb", "", None, 3]
)
def test_a_hostile_shard_name_in_the_index_is_refused(name, make_dataset) -> None:
    folder = make_dataset(TEXTS)
    rewrite_index(folder, lambda content: content["shards"][0].update(name=name))
    with pytest.raises(DataError, match="malformed") as caught:
        load_index(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "format version 2, this program reads 1"),
        (lambda c: c.update(format="other"), "not a haloformer-shards index"),
        (lambda c: c.update(dtype="O"), "malformed.*dtype"),
        (lambda c: c.pop("tokenizer"), "malformed"),
        (lambda c: c["shards"].append(c["shards"][0]), "a shard is named twice"),
        (lambda c: c["shards"][0].update(num_tokens=-1), "num_tokens -1"),
        (lambda c: c["shards"][0].update(num_tokens="9"), "num_tokens '9'"),
        (lambda c: c["shards"][0].update(extra=1), "malformed"),
        (lambda c: c.update(shards=[]), "no token"),
    ],
)
def test_a_malformed_index_is_refused(change, message, make_dataset) -> None:
    folder = make_dataset(TEXTS)
    rewrite_index(folder, change)
    with pytest.raises(DataError, match=message):
        load_index(folder)


def test_any_flipped_byte_of_the_index_is_noticed(make_dataset) -> None:
    folder = make_dataset(TEXTS)
    path = folder / "index.json"
    sound = path.read_bytes()
    before = load_index(folder)
    for at in range(0, len(sound) - 1, 7):
        flipped = bytearray(sound)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        try:
            assert load_index(folder) == before  # blank space may change, content may not
        except DataError as fault:
            assert "index.json" in str(fault)


def test_a_table_of_a_lying_index_is_refused(make_dataset) -> None:
    folder = make_dataset(TEXTS)
    path = folder / "shard-000000.offsets"
    table = load_table(load_index(folder), 0).copy()
    table["num_tokens"][0] = 0
    path.write_bytes(table.tobytes())
    with pytest.raises(DataError, match="offset table is damaged"):
        load_table(load_index(folder), 0)
    sha256 = hashlib.sha256(table.tobytes()).hexdigest()
    rewrite_index(folder, lambda content: content["shards"][0].update(table_sha256=sha256))
    with pytest.raises(DataError, match="does not sum to"):
        load_table(load_index(folder), 0)


def test_the_wrong_tokenizer_beside_the_shards_is_refused(make_dataset) -> None:
    folder = make_dataset(TEXTS)
    index = load_index(folder)
    train_bpe(TEXTS, 270).save(folder / "tokenizer")
    with pytest.raises(DataError, match=r"did not make the tokens of .* \(those are from byte"):
        index.load_tokenizer()
    with pytest.raises(DataError, match="did not make the tokens"):
        verify(folder)
