"""Streams of annotated examples: laid out as told, each once per epoch, alike on any ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline import example_stream
from haloformer.data_pipeline.blend import Corpora, Corpus
from haloformer.data_pipeline.errors import CorruptSampleError, DataError
from haloformer.data_pipeline.examples import ExampleBatch
from haloformer.data_pipeline.index import load_index, load_table
from haloformer.data_pipeline.prefetch import Prefetcher
from haloformer.data_pipeline.reader import verify

KINDS = ("classification", "questions", "choices", "coreference")
NUM = 11  # no multiple of the batch: batches span the ends of epochs
BOS, PAD, EOS = 0, 1, 2


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, make_examples) -> Path:
    path = make_examples(kind, NUM)
    assert len(load_index(path).shards) > 2
    return path


def stream_of(kind: str, part: str):
    return getattr(example_stream, f"{kind.capitalize()}{part}Stream")


def ranks(kind: str, folder: Corpora, config, world: int, **changes) -> list:
    options = {"seed": 5, "global_batch": 4, **changes}
    return [
        stream_of(kind, "Train")(folder, config, data_rank=r, data_world=world, **options)
        for r in range(world)
    ]


def held_out(kind: str, folder: Path, config, **changes):
    options = {"global_batch": NUM, "data_rank": 0, "data_world": 1, **changes}
    return stream_of(kind, "Eval")(folder, config, **options)


def kept(values: np.ndarray, fill: int) -> list:
    """Rows of a label or candidate array that are not filling."""
    return [row for row in values.tolist() if row != fill and row != [fill] * np.size(row)]


def rows_of(batch: ExampleBatch) -> dict[int, tuple]:
    """Slot -> everything the model sees of it, padding left out."""
    return {
        slot: (
            batch.input_ids[row][batch.attention_mask[row]].tolist(),
            batch.global_positions[row][batch.global_mask[row]].tolist(),
            kept(np.atleast_1d(batch.labels[row]), -1),
            kept(batch.candidates[row], -1),
            bool(batch.was_cut[row]),
            batch.keys[row],
        )
        for row, slot in enumerate(batch.sample_ids.tolist())
    }


def expected_row(kind: str, texts: list[str], num_candidates: int) -> tuple[list, int, list]:
    """Ids, number of globals and markers, written down as the picture in ``examples`` says."""
    ids, globals_, markers = [BOS], 1, []
    for number, text in enumerate(texts):
        if number == 1:
            globals_ = len(ids)  # of a question alone, before its </s>
            ids.append(EOS)
        if number == 1 + num_candidates and num_candidates:
            globals_ = len(ids)
        if number:
            if number <= num_candidates:
                markers.append(len(ids))
            ids.append(EOS)
        ids += [byte + 4 for byte in text.encode()]
    return [*ids, EOS], 0 if kind == "coreference" else globals_, markers


@pytest.mark.parametrize("seq_len", [40, 10_000])
def test_rows_are_laid_out_as_their_kind_says_and_cut_at_the_end(
    kind, folder, seq_len, make_config
) -> None:
    stream = held_out(kind, folder, make_config(seq_len=seq_len), pad_multiple=8)
    (batch,) = stream
    assert batch.input_ids.shape[1] % 8 == 0 and batch.num_examples == NUM
    assert batch.num_tokens == sum(len(row[0]) for row in rows_of(batch).values())
    cut = []
    for n, (ids, globals_, labels, markers, was_cut, key) in enumerate(rows_of(batch).values()):
        note, texts = stream.annotation(key), stream.texts(key)
        assert note["id"] == f"e{n}"
        whole, num_globals, all_markers = expected_row(
            kind, texts, n % 3 + 2 if kind == "choices" else 0
        )
        assert stream.token_ids(key).tolist() == whole
        assert ids == (whole if len(whole) <= seq_len else [*whole[: seq_len - 1], EOS])
        assert was_cut == (len(whole) > seq_len)
        cut.append(was_cut)
        assert globals_ == list(range(num_globals))
        assert markers == all_markers and all(ids[at] == EOS for at in markers)
        if kind == "classification":
            assert labels == [n % 2] and note["label"] == stream.index.labels[n % 2]
        elif kind == "choices":
            assert labels == [n % 2] == [note["label"]]
        else:
            told = note["clusters"] if kind == "coreference" else [note["answer_tokens"]]
            told = sorted([*span, group] for group, part in enumerate(told) for span in part)
            assert len(told) == n + 1
            assert {stream.span_text(key, first, last) for first, last, _ in told} == {"ab"}
            if kind == "questions":
                told = [span[:2] for span in told]
            assert labels == [span for span in told if span[1] < seq_len - 1]
            assert all(bytes(i - 4 for i in ids[s[0] : s[1] + 1]) == b"ab" for s in labels)
    assert any(cut) == (seq_len == 40)


def test_a_candidate_or_a_question_beyond_the_cut_is_no_label(make_examples, make_config) -> None:
    path = make_examples("choices", 3)
    (batch,) = held_out("choices", path, make_config(seq_len=10), global_batch=3)
    # <s> query </s> </s> c0 </s>: of the candidates only the first has its marker in the row.
    assert batch.candidates.tolist() == [[7]] * 3
    assert batch.labels.tolist() == [0, -100, 0]
    assert batch.global_positions.tolist() == [list(range(10))] * 3 and batch.global_mask.all()


def test_no_more_than_64_occurrences_of_an_answer_are_labels(make_examples, make_config) -> None:
    path = make_examples("questions", 70)
    (batch,) = held_out("questions", path, make_config(seq_len=500), global_batch=70)
    assert batch.labels.shape == (70, 64, 2) and (batch.labels[69] >= 0).all()


@pytest.mark.parametrize("global_tokens", ["first", "none"])
def test_global_tokens_none_leaves_no_kind_any(kind, folder, global_tokens, make_config) -> None:
    (batch,) = held_out(kind, folder, make_config(global_tokens=global_tokens))
    has = global_tokens == "first" and kind != "coreference"
    assert (batch.global_positions.shape[1] > 0) == has == bool(batch.global_mask.any())


def test_every_example_is_read_once_per_epoch_and_alike_on_any_ranks(
    kind, folder, make_config
) -> None:
    config = make_config(seq_len=64)
    worlds = [ranks(kind, folder, config, world) for world in (1, 2, 4)]
    keys = []
    for _ in range(3 * NUM // 4 + 1):
        batches = []
        for streams in worlds:
            slots: dict[int, tuple] = {}
            for stream in streams:
                slots |= rows_of(stream.next_batch())
            batches.append(dict(sorted(slots.items())))
        assert batches[0] == batches[1] == batches[2]
        keys += [row[-1] for row in batches[0].values()]
    infos = load_index(folder).shards
    whole = [(shard, n) for shard, info in enumerate(infos) for n in range(info.num_samples)]
    for epoch in range(3):
        assert sorted(key[1:] for key in keys if key.epoch == epoch) == whole
    assert len(set(keys)) == len(keys)


def test_a_prefetched_blend_resumes_exactly_from_every_step(kind, folder, make_config) -> None:
    config = make_config(seq_len=64, workers=2)
    corpora = [Corpus(folder, 1.0), Corpus(folder, 2.0)]

    def open_stream() -> Prefetcher:
        return Prefetcher(ranks(kind, corpora, config, 1)[0], 2)

    run, states, batches = open_stream(), [], []
    for _ in range(6):
        states.append(run.state_dict())
        batches.append(rows_of(run.next_batch()))
    run.close()
    for step in (0, 3, 5):
        again = open_stream()
        again.load_state(states[step])
        assert rows_of(again.next_batch()) == batches[step]
        again.close()
    with pytest.raises(DataError, match="is no epoch and position below 11 and 11"):
        ranks(kind, corpora, config, 1)[0].load_state({"pairs": [0, 0]})


def test_evaluation_reads_every_example_once_and_fills_the_last_batch(
    kind, folder, make_config
) -> None:
    seen = []
    for world in (1, 4):
        slots: dict[tuple[int, int], tuple] = {}
        for rank in range(world):
            options = {"global_batch": 4, "data_rank": rank, "data_world": world}
            for step, batch in enumerate(held_out(kind, folder, make_config(), **options)):
                slots |= {(step, slot): row for slot, row in rows_of(batch).items()}
        seen.append(slots)
    assert seen[0] == seen[1]
    rows = [row for _, row in sorted(seen[0].items())]
    keys = [row[-1] for row in rows]
    assert keys[-1] is None and None not in keys[:NUM] and keys[:NUM] == sorted(set(keys[:NUM]))
    no_label: list = [-100] if kind in ("classification", "choices") else []
    assert rows[-1][:5] == ([], [], no_label, [], False)


def test_micro_batches_are_the_batch_in_parts_and_no_wider_than_they_must(
    kind, folder, make_config
) -> None:
    (batch,) = held_out(kind, folder, make_config(seq_len=64), pad_multiple=4)
    parts = list(batch.split(2))
    assert {k: v for part in parts for k, v in rows_of(part).items()} == rows_of(batch)
    for part in parts:
        real = int(part.attention_mask.sum(1).max())
        assert part.input_ids.shape[1] % 4 == 0 and real <= part.input_ids.shape[1] < real + 4
        assert part.global_mask.shape[1] == part.global_mask.sum(1).max()
    assert len({part.input_ids.shape for part in parts}) > 1
    assert sum(part.num_examples for part in parts) == NUM


@pytest.mark.parametrize("part", ["note", "tokens"])
def test_a_flipped_byte_stops_or_makes_padding_and_verify_finds_it(
    kind, folder, part, make_config
) -> None:
    index = load_index(folder)
    record, name = load_table(index, 0)[1], index.shards[0].name
    content = bytearray((folder / name).read_bytes())
    at = int(record["note_offset"]) if part == "note" else int(record["offset"])
    content[at + 3] ^= 1
    (folder / name).write_bytes(content)
    what = {"note": "annotation is", "tokens": "tokens are"}[part]
    with pytest.raises(CorruptSampleError, match=rf"{name}: sample 1: the {what} damaged"):
        list(held_out(kind, folder, make_config()))
    lenient = make_config(on_corrupt="skip", seq_len=64)
    stream = ranks(kind, folder, lenient, 1, global_batch=NUM)[0]
    batch = stream.next_batch()
    assert batch.keys.count(None) == stream.num_skipped == 1 and batch.num_examples == NUM - 1
    with pytest.raises(DataError, match=r"damaged \(wrong sha256\)"):
        verify(folder)


def test_other_kinds_and_other_labels_are_refused(make_examples, make_config) -> None:
    folder = make_examples("classification", 3)
    with pytest.raises(DataError, match="holds classification, and this model is trained on quest"):
        ranks("questions", folder, make_config(), 1)
    index = load_index(folder)
    index.check_labels(("neg", "pos"), "train")
    with pytest.raises(DataError, match="has the labels neg, pos, and train has pos, neg"):
        index.check_labels(("pos", "neg"), "train")
    assert ranks("classification", folder, make_config(), 1)[0].facts.labels == ("neg", "pos")
