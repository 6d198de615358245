"""Corpora at the edges: every token once per epoch on any number of ranks, and nothing hangs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import RECORD, ShardInfo, load_index, load_table, save_index
from haloformer.data_pipeline.prefetch import Prefetcher
from haloformer.data_pipeline.prepare import prepare
from haloformer.data_pipeline.reader import ShardReader, verify
from haloformer.data_pipeline.stream import EvalStream, TrainStream
from haloformer.data_pipeline.tokenizers import ByteTokenizer

GLOBAL_BATCH = 12
WORLDS = (1, 2, 3, 4)
NUM_EPOCHS = 3
CORPORA = {  # token counts of the documents, tokens of a shard
    "fewer shards than ranks": ([150, 300], 1000),
    "one giant document": ([5000], 100),
    "thousands of tiny documents": ([1, 2, 1, 3, 1, 1, 2, 1] * 300, 900),
    "a giant among tiny ones": ([1, 2, 4000, 1, 3, 1], 40),
    "fewer documents than streams": ([40, 7, 90], 50),
}


def ranks(folder: Path, config, world: int) -> list[Prefetcher]:
    return [
        Prefetcher(
            TrainStream(
                folder, config, seed=5, global_batch=GLOBAL_BATCH, data_rank=rank, data_world=world
            ),
            2,
        )
        for rank in range(world)
    ]


def read_epochs(folder: Path, config) -> Counter:
    """Tokens of the first epochs, read by 1, 2, 3 and 4 ranks in turn, each for a while."""
    read: Counter = Counter()
    state, turn = None, 0
    while state is None or min(cursor[0] for cursor in state.values()) < NUM_EPOCHS:
        streams = ranks(folder, config, WORLDS[turn % len(WORLDS)])
        if state is not None:
            for stream in streams:
                stream.load_state(state)
        for _ in range(turn % 7 + 1):
            for stream in streams:
                for spans in stream.next_batch().spans:
                    for span in spans:
                        read.update((*span[:3], token) for token in range(span.start, span.stop))
        state = {key: value for stream in streams for key, value in stream.state_dict().items()}
        for stream in streams:
            stream.close()
        turn += 1
    return read


def expected(folder: Path) -> Counter:
    index = load_index(folder)
    reader = ShardReader(index)
    return Counter(
        (epoch, shard, sample, token)
        for epoch in range(NUM_EPOCHS)
        for shard in range(len(index.shards))
        for sample, length in enumerate(reader.lengths(shard).tolist())
        for token in range(length)
    )


def assert_every_token_once(folder: Path, config) -> None:
    read = read_epochs(folder, config)
    assert {key: n for key, n in read.items() if key[0] < NUM_EPOCHS} == expected(folder)


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_token_is_read_once_per_epoch(corpus, isolate, make_dataset, make_config) -> None:
    documents, shard_tokens = CORPORA[corpus]
    folder = make_dataset(documents, shard_tokens=shard_tokens)
    if corpus == "fewer shards than ranks":
        assert len(load_index(folder).shards) == 1
    assert_every_token_once(folder, make_config(isolate_documents=isolate))


def add_empty_shards(folder: Path, at: tuple[int, ...]) -> None:
    """Put shards without a document into a data set, so that they have these numbers."""
    index = load_index(folder)
    shards, empty = list(index.shards), io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w"):
        pass
    for number in at:
        content = empty.getvalue() if number % 2 else b""  # a tar of nothing, or no byte at all
        info = ShardInfo(
            f"shard-{900000 + number}.tar", len(content), hashlib.sha256(content).hexdigest(),
            hashlib.sha256(b"").hexdigest(), 0, 0, 0, 0,
        )  # fmt: skip
        (folder / info.name).write_bytes(content)
        (folder / info.table_name).write_bytes(b"")
        shards.insert(number, info)
    save_index(folder, shards, index.dtype, ByteTokenizer(), index.content)


@pytest.mark.parametrize("shuffle_block", [1, 3])
def test_shards_without_a_document_change_nothing(shuffle_block, make_dataset, make_config) -> None:
    documents = [40, 3, 90, 1, 200, 66]
    folder = make_dataset(documents, shard_tokens=50)
    num_shards = len(load_index(folder).shards)
    add_empty_shards(folder, (0, 2, 3, num_shards + 3))
    assert verify(folder).num_samples == len(documents)
    config = make_config(shuffle_block=shuffle_block)
    assert_every_token_once(folder, config)
    held = EvalStream(folder, config, global_batch=4, data_rank=0, data_world=1)
    spans = [span for batch in held for row in batch.spans for span in row]
    assert sum(span.stop - span.start for span in spans) == sum(documents)


def test_a_document_without_tokens_is_refused_by_name(make_dataset, make_config) -> None:
    folder = make_dataset([40, 3, 90], shard_tokens=1000)
    index = load_index(folder)
    table = load_table(index, 0).copy()
    table["num_tokens"] = [40, 0, 93]
    content = table.astype(RECORD).tobytes()
    (folder / index.shards[0].table_name).write_bytes(content)
    told = dataclasses.replace(index.shards[0], table_sha256=hashlib.sha256(content).hexdigest())
    save_index(folder, [told], index.dtype, ByteTokenizer(), index.content)
    with pytest.raises(DataError, match=r"shard-000000.offsets: sample 1: the document has no"):
        ranks(folder, make_config(), 1)


def test_empty_texts_are_left_out_when_data_is_prepared(tmp_path: Path, make_config) -> None:
    texts = ["first " * 20, "", "  \n", "second " * 9, ""]
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([source], source_format="jsonl", tokenizer="byte", output=tmp_path / "out", holdout=0.0)
    index = load_index(tmp_path / "out" / "train")
    assert index.num_samples == 2
    assert np.all(load_table(index, 0)["num_tokens"] > 0)
    assert_every_token_once(tmp_path / "out" / "train", make_config())
