"""Pairs of texts: from JSONL and from article leads to shards and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.leads import split_lead
from haloformer.data_pipeline.prepare import Prepared, prepare
from haloformer.data_pipeline.reader import ShardReader, verify
from haloformer.data_pipeline.stream import TrainStream

LEAD = "An '''ant''' is a [[insect|small insect]]" + " that lives in colonies" * 10
BODY = "== Body ==\n" + "Ants have six legs. " * 30
ARTICLE = f"{{{{infobox}}}}\n{LEAD}\n\n{BODY}\n=== More ===\nToo.\n== See also ==\n* [[Bee]]\n"


def write_pairs(path: Path, count: int) -> list[tuple[str, str]]:
    pairs = [(f"source {n} " + "long " * n, f"answer {n} \u00e9") for n in range(count)]
    lines = (json.dumps({"source": s, "target": t, "id": 3}) for s, t in pairs)
    path.write_text("\n".join(lines) + "\n\n", "utf-8")
    return pairs


def run(path: Path, source_format: str = "pairs", **changes) -> Prepared:
    options = {"tokenizer": "byte", "holdout": 0.2, "shard_tokens": 200}
    output = path.parent / "out"
    return prepare([path], source_format=source_format, output=output, **{**options, **changes})  # type: ignore[arg-type]


def texts(folder: Path) -> list[tuple[str, str]]:
    index = load_index(folder)
    reader, tokenizer = ShardReader(index), index.load_tokenizer()
    found = []
    for shard, info in enumerate(index.shards):
        for sample in range(info.num_samples):
            cut, end = reader.pair_lengths(shard, sample)
            source, target = (reader.read(shard, sample, *part) for part in ((0, cut), (cut, end)))
            found.append((tokenizer.decode(source.tolist()), tokenizer.decode(target.tolist())))
    return found


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_every_pair_is_in_one_part_as_it_was_written(tmp_path: Path, tokenizer: str) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    result = run(tmp_path / "pairs.jsonl", tokenizer=tokenizer)
    assert result.eval is not None and result.eval.num_samples == 4
    assert len(result.train.shards) > 1
    parts = [texts(tmp_path / "out" / part) for part in ("train", "eval")]
    assert sorted(parts[0] + parts[1]) == sorted(pairs)
    for part in ("train", "eval"):
        assert verify(tmp_path / "out" / part).content == "pairs"
    assert run(tmp_path / "pairs.jsonl", tokenizer=tokenizer).reused


def test_a_trained_tokenizer_has_read_the_targets_too(tmp_path: Path) -> None:
    lines = [json.dumps({"source": "abc", "target": "zebra " * 50})] * 10
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    result = run(tmp_path / "pairs.jsonl", tokenizer="train:300")
    assert len(result.train.load_tokenizer().encode(" zebra")) == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"source": "a"}', r'no string under the key "target"; .*"source": "...", "target"'),
        ('{"text": "a"}', 'no string under the key "source"'),
        ('{"source": "a", "target": 3}', 'no string under the key "target"'),
        ('{"source": "a", "target": " "}', '"target" is empty; remove the line'),
        ("[1]", 'no string under the key "source"'),
        ("{", "not JSON"),
        ('{"source": "a", "target": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n' + line)
    with pytest.raises(DataError, match=named) as caught:
        run(path)
    assert "pairs.jsonl:2: " in str(caught.value) and "\n" not in str(caught.value)


def test_the_lead_is_the_target_and_the_prose_after_it_the_source() -> None:
    pair = split_lead(ARTICLE)
    assert pair is not None
    source, target = pair
    assert target == "An ant is a small insect" + " that lives in colonies" * 10
    assert source.startswith("Body\n\nAnts have six legs.") and source.endswith("More\n\nToo.")
    raw = split_lead(ARTICLE, keep_markup=True)
    assert raw is not None and raw[1].startswith("{{infobox}}")


@pytest.mark.parametrize(
    "article",
    [
        LEAD,  # no heading
        f"Short lead.\n{BODY}",
        f"{LEAD}\n== Body ==\nLess than the lead.",
        f"{LEAD}\n== References ==\n" + "a reference " * 100,
    ],
)
def test_an_article_without_a_lead_and_a_longer_body_is_no_pair(article: str) -> None:
    assert split_lead(article) is None


def test_a_dump_becomes_pairs_of_its_articles(tmp_path: Path) -> None:
    pages = "".join(
        f"<page><title>T{n}</title><ns>0</ns><text>{text}</text></page>"
        for n, text in enumerate([ARTICLE, "no pair", ARTICLE])
    )
    (tmp_path / "dump.xml").write_text(f"<mediawiki>{pages}</mediawiki>")
    result = run(tmp_path / "dump.xml", "mediawiki_lead", holdout=0.0)
    assert result.train.num_samples == 2
    assert texts(tmp_path / "out" / "train") == [split_lead(ARTICLE)] * 2


def test_a_stream_of_text_refuses_pairs(tmp_path: Path, make_config) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 5)
    run(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match="it holds pairs, and this model is trained on documents"):
        TrainStream(
            tmp_path / "out" / "train", make_config(), seed=1, global_batch=1, data_rank=0,
            data_world=1,
        )  # fmt: skip
