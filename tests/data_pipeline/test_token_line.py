"""The line of all documents: any part of it is that part of the whole, which is as drawn."""

import numpy as np
import pytest

from haloformer.data_pipeline.errors import CorruptSampleError
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.token_line import TokenLine
from haloformer.data_pipeline.tokenizers import ByteTokenizer

TEXTS = ["abc", "d", "efghij", "kl", "m" * 9]
SPECIAL = ByteTokenizer.specials


@pytest.fixture
def data(tmp_path):
    """Shards of a few tokens, so that there are several."""
    tokenizer = ByteTokenizer()
    with DatasetWriter(tmp_path, tokenizer, 8) as writer:
        for number, text in enumerate(TEXTS):
            writer.add(text, tokenizer.encode(text), f"document {number}")
        writer.close()
    assert len(load_index(tmp_path).shards) > 2
    return tmp_path


def line_of(folder, isolate, skip=False):
    reader = ShardReader(load_index(folder), "skip" if skip else "stop")
    return TokenLine(reader, ByteTokenizer(), isolate=isolate, skip_corrupt=skip)


def drawn(isolate):
    """Ids and segments of the whole line."""
    ids, segments = [] if isolate else [SPECIAL.bos], [] if isolate else [0]
    for number, text in enumerate(TEXTS):
        slots = [*ByteTokenizer().encode(text).tolist(), SPECIAL.eos]
        ids += [SPECIAL.bos, *slots] if isolate else slots
        segments += [number] * (len(slots) + 1) if isolate else [0] * len(slots)
    return ids, segments


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
def test_every_part_of_the_line_is_that_part_of_the_whole(data, isolate):
    line, (ids, segments) = line_of(data, isolate), drawn(isolate)
    assert line.num_slots == len(ids)
    following = np.array([*ids[1:], -100])
    labels = np.where(np.isin(following, SPECIAL), -100, following)
    assert (labels >= 0).sum() == sum(map(len, TEXTS))  # every character, once
    for first in range(len(ids)):
        for stop in range(first + 1, len(ids) + 1):
            part = line.read(first, stop)
            assert part.ids.tolist() == ids[first:stop]
            assert part.labels.tolist() == labels[first:stop].tolist()
            if isolate:
                assert part.segments.tolist() == segments[first:stop]
            else:
                assert part.segments is None
    assert line.skipped == []


def test_a_damaged_document_is_an_error_or_becomes_that_many_separators(data):
    shard = next(iter(sorted(data.glob("*.tar"))))
    content = shard.read_bytes()
    tokens = ByteTokenizer().encode("abc").astype("<u2").tobytes()
    assert content.count(tokens) == 1
    shard.write_bytes(content.replace(tokens, b"\0" * len(tokens)))
    with pytest.raises(CorruptSampleError, match="wrong crc32"):
        line_of(data, False).read(0, 10)
    line, (ids, _) = line_of(data, False, skip=True), drawn(False)
    part = line.read(0, len(ids))
    assert part.ids.tolist() == [SPECIAL.bos, *[SPECIAL.eos] * 3, *ids[4:]]
    assert (part.labels >= 0).sum() == sum(map(len, TEXTS)) - 3
    assert line.skipped == [(0, 0)]
