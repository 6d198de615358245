from __future__ import annotations

import argparse
import bz2
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from full_disk import mounted
from haloformer.data_pipeline import prepare_cli
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import check_free_disk
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.prepare import Prepared, Progress, prepare
from haloformer.data_pipeline.reader import ShardReader, verify


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"document {n} " + "the window " * (n % 7)}) for n in range(60)]
    path.write_text("\n".join(lines), "utf-8")
    return path


def run(corpus: Path, **changes) -> Prepared:
    options = {
        "source_format": "jsonl",
        "tokenizer": "byte",
        "output": corpus.parent / "out",
        "holdout": 0.1,
        "shard_tokens": 500,
    }
    return prepare([corpus], **{**options, **changes})


def texts(folder: Path) -> list[str]:
    index = load_index(folder)
    reader, tokenizer = ShardReader(index), index.load_tokenizer()
    return [
        tokenizer.decode(reader.read(shard, sample, 0, length).tolist())
        for shard in range(len(index.shards))
        for sample, length in enumerate(reader.lengths(shard).tolist())
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_every_document_lands_in_train_or_eval_and_both_verify(tokenizer, corpus) -> None:
    result = run(corpus, tokenizer=tokenizer)
    train, held = texts(result.folder / "train"), texts(result.folder / "eval")
    expected = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    assert sorted(train + held) == sorted(expected)
    assert len(held) == 6
    gaps = [expected.index(text) for text in held]
    assert {later - earlier for earlier, later in itertools.pairwise(gaps)} == {10}
    assert len(result.train.shards) > 1
    assert result.eval is not None
    assert result.train.tokenizer_sha256 == result.eval.tokenizer_sha256
    verify(result.folder / "train")
    verify(result.folder / "eval")
    assert leftovers(corpus.parent) == []


def test_a_trained_tokenizer_has_not_seen_the_held_out_part(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [{"text": "zyzzyva " * 50 if n == 1 else "plain words here " * 50} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    result = run(path, tokenizer="train:400", holdout=0.25)
    assert texts(result.folder / "eval") == [lines[1]["text"]]
    tokenizer = result.train.load_tokenizer()
    assert len(tokenizer.encode(" plain")) == 1 and len(tokenizer.encode(" zyzzyva")) == 8


def test_the_same_request_is_answered_by_what_is_there(corpus: Path) -> None:
    first = run(corpus)
    before = snapshot(first.folder)
    assert not first.reused
    again = run(corpus)
    assert again.reused and again.train == first.train
    os.utime(corpus, ns=(1, 1))  # another date, the same content
    assert run(corpus).reused
    assert snapshot(first.folder) == before


def test_another_request_is_refused_unless_told_to_overwrite(corpus: Path) -> None:
    first = run(corpus)
    before = snapshot(first.folder)
    for changes, name in (
        ({"tokenizer": "train:300"}, "tokenizer byte"),
        ({"holdout": 0.2}, "holdout 0.1 -> 0.2"),
        ({"shard_tokens": 400}, "shard_tokens 500 -> 400"),
    ):
        with pytest.raises(DataError, match=rf"another request \({name}.*--overwrite"):
            run(corpus, **changes)
    corpus.write_text(corpus.read_text("utf-8").replace("window", "shadow"), "utf-8")
    with pytest.raises(DataError, match=r"another request \(input\)"):
        run(corpus)
    assert snapshot(first.folder) == before
    assert not run(corpus, overwrite=True).reused
    assert "shadow" in "".join(texts(first.folder / "train"))
    assert leftovers(corpus.parent) == []


def test_a_folder_that_prepare_did_not_make_is_never_overwritten(corpus: Path) -> None:
    output = corpus.parent / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work", "utf-8")
    with pytest.raises(DataError, match="was not made by prepare"):
        run(corpus, overwrite=True)
    assert (output / "thesis.tex").exists()
    (output / "thesis.tex").unlink()
    assert not run(corpus).reused  # an empty folder is fine


def test_preparing_twice_makes_the_same_bytes(corpus: Path) -> None:
    for tokenizer in ("byte", "train:300"):
        first = run(corpus, tokenizer=tokenizer, output=corpus.parent / f"a-{tokenizer}")
        second = run(corpus, tokenizer=tokenizer, output=corpus.parent / f"b-{tokenizer}")
        assert snapshot(first.folder) == snapshot(second.folder)


def test_killed_while_writing_leaves_nothing_that_looks_like_data(corpus: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from haloformer.data_pipeline.prepare import prepare\n"
        "def die(at):\n"
        "    if at.num_documents == 40: os.kill(os.getpid(), 9)\n"
        "prepare([Path(sys.argv[1])], source_format='jsonl', tokenizer='byte', "
        "output=Path(sys.argv[2]), shard_tokens=500, holdout=0.1, progress=die)\n"
    )
    output = corpus.parent / "out"
    done = subprocess.run([sys.executable, "-c", code, str(corpus), str(output)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not output.exists() and leftovers(corpus.parent) == [".out.partial"]
    assert not list(corpus.parent.rglob("index.json"))
    assert run(corpus).train.num_samples == 54
    assert leftovers(corpus.parent) == []


def test_a_failure_while_writing_leaves_nothing(corpus: Path) -> None:
    corpus.write_text(corpus.read_text("utf-8") + "\n{oops", "utf-8")
    with pytest.raises(DataError, match=r"corpus.jsonl:61: not JSON"):
        run(corpus)
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus.jsonl"]


def test_two_writers_of_one_output_do_not_mix(corpus: Path) -> None:
    (corpus.parent / ".out.partial").mkdir()
    with (corpus.parent / ".out.partial" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another prepare is writing"):
            run(corpus)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("", {}, "the file is empty"),
        ('{"text": " "}\n', {}, "0 documents with text"),
        ('{"text": "one"}\n', {}, r"holdout of 0.1 of 1 documents .* --holdout 0"),
        ('{"text": "one"}\n', {"holdout": 0.7}, "holdout 0.7 is not a share"),
        ('{"text": "one"}\n', {"tokenizer": "train:many"}, "like train:8192"),
        ('{"text": "one"}\n', {"tokenizer": "train:9"}, "at least 261"),
        ('{"text": "one"}\n', {"tokenizer": "gpt"}, "tokenizer gpt is no folder"),
        ('{"text": "one"}\n', {"shard_tokens": 0}, "shard_tokens 0"),
    ],
)
def test_bad_requests_are_refused_in_one_line(content, changes, message, tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(DataError, match=message) as caught:
        run(path, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


def test_no_holdout_makes_no_eval_part(corpus: Path) -> None:
    result = run(corpus, holdout=0.0)
    assert result.eval is None and not (result.folder / "eval").exists()
    assert result.train.num_samples == 60
    assert run(corpus, holdout=0.0).reused


def test_too_little_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MiB are needed and \d+ MiB are free"):
        check_free_disk(tmp_path / "not" / "there", 1 << 62)
    check_free_disk(tmp_path / "not" / "there", 1)


@pytest.mark.root
def test_a_disk_that_fills_up_while_writing_is_one_line_and_leaves_nothing(tmp_path) -> None:
    with mounted(tmp_path / "small", "size=200k") as small:
        path = tmp_path / "x.txt.bz2"  # shrinks more than the estimate thinks, so writing begins
        path.write_bytes(bz2.compress(b"word " * 100_000))
        with pytest.raises(DataError, match=r"out: cannot go on: .* check free disk"):
            run(path, source_format="text", holdout=0.0, output=small / "out")
        assert list(small.iterdir()) == []
        path = tmp_path / "y.txt"  # what cannot fit is refused before anything is written
        path.write_bytes(b"word " * 100_000)
        with pytest.raises(DataError, match=r"MiB are needed and 0 MiB are free"):
            run(path, source_format="text", holdout=0.0, output=small / "out")


def test_progress_reaches_the_end_of_the_input(corpus: Path) -> None:
    seen: list[Progress] = []
    run(corpus, tokenizer="train:300", progress=seen.append)
    assert [at.phase for at in seen] == ["reading"] * 60 + ["writing"] * 60
    assert seen[-1].bytes_read == seen[-1].bytes_total == corpus.stat().st_size
    assert seen[-1].num_documents == 60 and seen[-1].num_tokens > 0


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command_line_prints_a_summary_and_json(corpus: Path, capsys) -> None:
    arguments = ["--input", str(corpus), "--format", "jsonl", "--tokenizer", "byte"]
    arguments += ["--output", str(corpus.parent / "out")]
    assert prepare_cli.run(parse(*arguments)) == 0
    assert "57 documents" in capsys.readouterr().out
    assert prepare_cli.run(parse(*arguments, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["reused"] and summary["eval"]["documents"] == 3


def test_help_shows_an_example(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "haloformer prepare --input" in capsys.readouterr().out
