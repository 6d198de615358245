"""Published formats through ``prepare``: split, stored, read back by the streams of their kind."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest

from haloformer.data_pipeline import byte_parts, example_stream
from haloformer.data_pipeline.data_cli import run_verify
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import ShardIndex, load_index
from haloformer.data_pipeline.json_array import JsonArray
from haloformer.data_pipeline.prepare import Prepared, prepare
from haloformer.data_pipeline.prepare_cli import add_arguments
from haloformer.data_pipeline.prepare_cli import run as run_command
from haloformer.data_pipeline.reader import ShardReader, verify
from haloformer.data_pipeline.source_files import InputFile
from haloformer.data_pipeline.sources import iter_documents

RAW = bytes(range(256)) * 8 + "né\u4e2d".encode()[:-1]  # every byte, and a cut character


def run(path: Path, source_format: str, **changes) -> Prepared:
    options = {"tokenizer": "byte", "holdout": 0.0, "shard_tokens": 500, **changes}
    output = path.parent / "out"
    return prepare([path], source_format=source_format, output=output, **options)  # type: ignore[arg-type]


def stored_bytes(index: ShardIndex | None) -> list[bytes]:
    assert index is not None
    reader = ShardReader(index)
    return [
        bytes((reader.read(shard, sample, 0, int(length)) - 4).astype(np.uint8))
        for shard in range(len(index.shards))
        for sample, length in enumerate(reader.lengths(shard))
    ]


def test_enwik8_is_stored_byte_by_byte_and_split_where_the_field_splits_it(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(byte_parts, "PART_BYTES", 300)
    path = tmp_path / "enwik8"
    path.write_bytes(RAW)
    made = run(path, "enwik8", holdout=0.05)
    held = round(len(RAW) * 0.05)
    train, held_out, test = (stored_bytes(part) for part in (made.train, made.eval, made.test))
    assert b"".join(train) == RAW[: -2 * held] and {len(part) for part in train[:-1]} == {300}
    assert held_out == [RAW[-2 * held : -held]] and test == [RAW[-held:]]  # nothing in between
    assert made.train.bytes_per_token == made.train.characters_per_token == 1.0
    assert run_verify(Namespace(folders=[str(tmp_path / "out")])) == 0
    again = run(path, "enwik8", holdout=0.05)
    assert again.reused and again.test is not None


def test_100_million_bytes_are_split_90_to_5_to_5() -> None:
    file = InputFile(Path("/dev/zero"), "enwik8", 100_000_000)
    ends: dict[str, int] = {}
    for content, part, start in byte_parts.iter_byte_parts([file], 0.05):
        ends[part] = start + len(content)
    assert ends == {"train": 90_000_000, "eval": 95_000_000, "test": 100_000_000}


def test_a_large_file_is_read_in_bounded_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(byte_parts, "PART_BYTES", 1 << 16)
    path = tmp_path / "text8"
    with path.open("wb") as stream:
        stream.truncate(32 << 20)
    tracemalloc.start()
    files = [InputFile(path, "text8", 32 << 20)]
    count = sum(len(document.body) for document in iter_documents(files, "enwik8"))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 32 << 20 and peak < 1 << 19


def test_bytes_need_the_byte_tokenizer_and_one_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.write_bytes(RAW)
    with pytest.raises(DataError, match="enwik8 is bytes, not text; give --tokenizer byte"):
        run(path, "enwik8", tokenizer="train:300")
    path.rename(tmp_path / "enwik8.gz")
    with pytest.raises(DataError, match="one file, not compressed; unpack it"):
        run(tmp_path / "enwik8.gz", "enwik8")


def test_text8_holds_letters_and_blanks_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "text8"
    path.write_bytes(b" anarchism originated as a term" * 40)
    assert b"".join(stored_bytes(run(path, "text8").train)) == path.read_bytes()
    path.write_bytes(b" anarchism\n")
    with pytest.raises(DataError, match=r"text8: byte 10 is b'\\n', not one of .* --format enwik8"):
        run(path, "text8", overwrite=True)


def hotpot(path: Path, count: int) -> Path:
    records = [
        {
            "_id": f"q{n}",
            "question": f"Where is village {n}?",
            "answer": "yes" if n % 3 == 0 else f"Caf\u00e9 {n}",
            "context": [["Vill\u00e4ge", [f"It is near Caf\u00e9 {n}.", " No one knows."] * 2]],
            "supporting_facts": [],
            "type": "bridge",
            "level": "easy",
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(records), "utf-8")
    return path


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_answers_are_the_same_text_after_any_tokenizer(
    tokenizer, tmp_path: Path, make_config
) -> None:
    made = run(hotpot(tmp_path / "dev.json", 12), "hotpotqa", tokenizer=tokenizer, shard_tokens=150)
    assert len(made.train.shards) > 1 and made.train.num_samples == 12 and made.eval is None
    assert verify(tmp_path / "out" / "train").content == "questions"
    stream = example_stream.QuestionsEvalStream(
        tmp_path / "out" / "train", make_config(seq_len=400), global_batch=12, data_rank=0,
        data_world=1,
    )  # fmt: skip
    (batch,) = stream
    for row, key in enumerate(batch.keys):
        assert key is not None
        note = stream.annotation(key)
        spans = [span for span in batch.labels[row].tolist() if span != [-1, -1]]
        assert {stream.span_text(key, *span) for span in spans} == set(note["answers"])
        assert len(spans) == (1 if note["answers"] == ["yes"] else 2)
        assert batch.input_ids[row][batch.attention_mask[row]].tolist() == list(
            stream.token_ids(key)
        )
        assert stream.texts(key)[0] == f"Where is village {note['id'][1:]}?"


def test_a_dev_set_is_prepared_with_the_tokenizer_and_labels_of_the_training_set(
    tmp_path: Path, make_config
) -> None:
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            for n in range(6):
                path = tmp_path / split / label / f"{n}_{n + 1}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{split} review {n} is {label}")
    options = {"source_format": "imdb", "holdout": 0.0}
    train = prepare(
        [tmp_path / "train"], tokenizer="train:300", output=tmp_path / "a", **options  # type: ignore[arg-type]
    )  # fmt: skip
    test = prepare(
        [tmp_path / "test"], tokenizer=str(tmp_path / "a" / "train" / "tokenizer"),
        output=tmp_path / "b", **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert train.train.labels == test.train.labels == ("neg", "pos")
    assert train.train.tokenizer_sha256 == test.train.tokenizer_sha256
    stream = example_stream.ClassificationEvalStream(
        tmp_path / "b" / "train", make_config(), global_batch=4, data_rank=0, data_world=1
    )
    labels = [label for batch in stream for label in batch.labels.tolist()]
    assert labels == [0, 1] * 6  # not one label first


def test_what_is_left_out_is_counted_and_told_again(tmp_path: Path, capsys) -> None:
    papers = [
        {"article_id": str(n), "article_text": ["a ."] * (n % 3), "abstract_text": ["<S> b </S>"]}
        for n in range(9)
    ]
    path = tmp_path / "train.txt"
    path.write_text("\n".join(map(json.dumps, papers)))
    parser = ArgumentParser()
    add_arguments(parser)
    line = f"--input {path} --format arxiv --tokenizer byte --holdout 0 --output {tmp_path / 'out'}"
    assert run_command(parser.parse_args(line.split())) == 0
    assert "left out: 3 records, no text or abstract" in capsys.readouterr().out
    assert run_command(parser.parse_args([*line.split(), "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reused"] and told["left_out"] == {"no text or abstract": 3}
    assert told["train"]["documents"] == 6 and told["test"] is None
    path.write_text(json.dumps(papers[0]))
    with pytest.raises(DataError, match="none of them for training, 1 left out: no text or abs"):
        run(path, "arxiv", overwrite=True)


def test_another_ground_truth_is_another_input(tmp_path: Path) -> None:
    truth = tmp_path / "ground-truth-x.xml"
    (tmp_path / "articles-x.xml").write_text('<articles><article id="1" title="t"/></articles>')
    for value in ("true", "false"):
        truth.write_text(f'<g><article id="1" hyperpartisan="{value}"/></g>')
        if value == "true":
            assert run(tmp_path / "articles-x.xml", "hyperpartisan").train.num_samples == 1
        else:
            with pytest.raises(DataError, match=r"another request \(input\)"):
                run(tmp_path / "articles-x.xml", "hyperpartisan")


def test_an_annotation_that_is_too_long_names_its_record(tmp_path: Path) -> None:
    path = hotpot(tmp_path / "dev.json", 2)
    records = json.loads(path.read_text())
    records[1]["answer"] = "x" * (1 << 20)
    path.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"dev.json: q1: the annotation has \d+ bytes, the limit"):
        run(path, "hotpotqa")


def test_a_json_array_is_read_whole_at_any_cut_and_in_bounded_memory(tmp_path: Path) -> None:
    letters = random.Random(0)
    records = [{"n": n, "t": letters.choice("aé\u4e2d\U0001f600") * n} for n in range(0, 400, 7)]
    file = InputFile(tmp_path / "x.json", "x.json", 1)

    class OneByOne:
        """Gives a few bytes at a time, so that characters and records are cut everywhere."""

        def __init__(self, content: bytes) -> None:
            self.content, self.at = content, 0

        def read(self, _: int) -> bytes:
            size = letters.randrange(1, 9)
            self.at += size
            return self.content[self.at - size : self.at]

    for key, whole in ((None, records), ("Data", {"V": 1, "Data": records, "W": [{}]})):
        for ascii_only in (True, False):
            content = json.dumps(whole, ensure_ascii=ascii_only, indent=1).encode()
            found = JsonArray(OneByOne(content), file, key)  # type: ignore[arg-type]
            assert [record for _, record in found] == records
    path = tmp_path / "big.json"
    path.write_text(json.dumps([{"t": "word " * 2000}] * 1000))
    tracemalloc.start()
    with path.open("rb") as stream:
        assert sum(1 for _ in JsonArray(stream, file, None)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # the file has 10 MB


def test_an_index_that_lies_about_labels_is_refused(tmp_path: Path, make_examples) -> None:
    folder = make_examples("choices", 2)
    content = json.loads((folder / "index.json").read_text())
    content["labels"] = ["a", "b"]
    content.pop("sha256")
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="2 labels, content 'choices'"):
        load_index(folder)
