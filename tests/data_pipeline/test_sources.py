from __future__ import annotations

import bz2
import gzip
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.sources import find_inputs, iter_documents
from haloformer.data_pipeline.wikitext import clean_wikitext

PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"


def dump(*pages: tuple[str, int, str, str]) -> str:
    return "<mediawiki>" + "".join(PAGE.format(*page) for page in pages) + "</mediawiki>"


def read(path: Path, source_format, **options) -> list[tuple[str, str]]:
    files = find_inputs([path], source_format)
    documents = iter_documents(files, source_format, **options)
    return [(d.origin, *d.texts) for d in documents if d.texts]


def test_a_text_file_is_a_document_and_a_folder_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("\ufeffB\n", "utf-8")
    (tmp_path / "deep" / "a.txt.gz").write_bytes(gzip.compress("Ä".encode()))
    (tmp_path / "c.txt").write_text("  \n", "utf-8")
    (tmp_path / "z.pdf").write_text("not text", "utf-8")
    assert read(tmp_path, "text") == [("b.txt", "B\n"), ("deep/a.txt.gz", "Ä")]


def test_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.bz2"
    path.write_bytes(bz2.compress(b'{"text": "one"}\n\n{"id": 3, "text": "two\\n"}'))
    assert read(path, "jsonl") == [("x.jsonl.bz2:1", "one"), ("x.jsonl.bz2:3", "two\n")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "x.jsonl:2: not JSON"),
        (b"[1]", 'x.jsonl:2: no string under the key "text"'),
        (b'{"text": 3}', 'x.jsonl:2: no string under the key "text"'),
        (b'{"text": "\xff"}', "x.jsonl:2: byte 10 is not UTF-8"),
        (b'{"text": "\\ud800"}', "x.jsonl:2: character 0 is half of a surrogate pair"),
        (b"[" * 100_000, "x.jsonl:2: not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "x.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read(path, "jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_articles_are_read_and_redirects_and_talk_are_not(tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml"
    path.write_text(
        dump(
            ("Kept", 0, "", "'''Bold''' &amp;lt;text&amp;gt;"),
            ("Moved", 0, '<redirect title="Kept"/>', "#REDIRECT [[Kept]]"),
            ("Old", 0, "", "#redirect [[Kept]]"),
            ("Silent", 0, '<redirect title="Kept"/>', "no keyword in the text"),
            ("Talk:Kept", 1, "", "chatter"),
        ),
        "utf-8",
    )
    assert read(path, "mediawiki") == [("wiki.xml: Kept", "Bold <text>")]
    assert read(path, "mediawiki", keep_markup=True)[0][1] == "'''Bold''' &lt;text&gt;"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dump(("A", 0, "", "text"))[:-20], "not well-formed XML"),
        ("<html></html>", "holds no <page>"),
        (
            '<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + dump(("A", 0, "", "&x;")),
            "document type declaration is not accepted",
        ),
        ('<!DOCTYPE m [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><m>&b;</m>', "not accepted"),
    ],
)
def test_a_bad_dump_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml"
    path.write_text(content, "utf-8")
    with pytest.raises(DataError, match=message):
        read(path, "mediawiki")


def test_a_dump_is_streamed_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml.bz2"
    text = "word " * 4000
    path.write_bytes(bz2.compress(dump(*[(f"P{n}", 0, "", text) for n in range(500)]).encode()))
    files = find_inputs([path], "mediawiki")
    tracemalloc.start()
    count = sum(1 for _ in iter_documents(files, "mediawiki", keep_markup=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 500 and peak < 2 << 20  # the dump has 10 MB


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.bz2").write_bytes(bz2.compress(b"x" * 1000)[:-5])
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-5])
    (tmp_path / "fake.txt.bz2").write_bytes(b"not compressed")
    for name, message in {
        "absent.txt": "no such file",
        "empty.txt": "the file is empty",
        "latin.txt": "byte 3 is not UTF-8",
        "cut.txt.bz2": "damaged or cut off",
        "cut.txt.gz": "damaged or cut off",
        "fake.txt.bz2": "damaged or cut off",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / name, "text")
        assert name in str(caught.value)
    with pytest.raises(DataError, match=r"holds no file that ends in \.jsonl"):
        read(tmp_path, "jsonl")


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''A''' is ''b''.", "A is b."),
        ("a [[b]] [[c|d]] [[e|]] [[:f]] g", "a b d e f g"),
        ("[[File:x.jpg|thumb|a [[b]] c]]text[[Category:Y]][[de:Z]]", "text"),
        ("x{{a|{{b}}|c=[[d]]}}y {{c\n|d}}z", "xy z"),
        ("p\n{| class=x\n|-\n| a {{b}}\n|}\nq", "p\n\nq"),
        ("a<ref>b</ref>c<ref name=d/>e<ref name='f'>{{g}}</ref>h", "aceh"),
        ("a<!-- b --><br/>c<small>d</small>", "acd"),
        ("see [http://x.org/y label] or [http://x.org]", "see label or"),
        ("== Head ==\ntext\n* one\n** two\n# three", "Head\n\ntext\none\ntwo\nthree"),
        ("a&nbsp;b &ndash; c", "a b \u2013 c"),
        ("open {{a text", "open {{a text"),
        ("close }} text ]]", "close }} text ]]"),
        ("a ( {{x}}, ) b", "a b"),
    ],
)
def test_markup_becomes_prose(wikitext: str, prose: str) -> None:
    assert clean_wikitext(wikitext) == prose


@pytest.mark.parametrize(
    "part",
    [
        "{{",
        "<ref>",
        "<ref ",
        "[[",
        "[[a|" + "b" * 40,
        "[http://",
        "<!--",
        "'",
        "== ",
        "( ",
        "\n ",
        "{|\n",
    ],
)
def test_hostile_markup_is_cleaned_in_linear_time(part: str) -> None:
    text = part * 60_000 + "]]" * 60_000
    began = time.process_time()
    clean_wikitext(text)
    assert time.process_time() - began < 2.0  # quadratic takes several times that at least


@pytest.mark.parametrize(
    "line",
    ["=" + " " * 3000 + "x", "=" * 20_000 + "x", "= " * 20_000 + "x", "[//" + "a" * 40_000],
    ids=["blanks", "equal signs", "both", "a link that never closes"],
)
def test_a_long_hostile_line_stays_and_costs_linear_time(line: str) -> None:
    began = time.process_time()
    assert clean_wikitext(line) == " ".join(line.split())
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("== A ==", "A"),
        ("==A= \t", "A"),
        ("= a = b =", "a = b"),
        ("======== deep ==", "== deep"),
        ("==", ""),
        ("== ==", ""),
        ("=", "="),
        ("== A", "== A"),
        (" == A ==", "== A =="),
    ],
)
def test_a_heading_is_its_title(line: str, title: str) -> None:
    assert clean_wikitext(line) == title


def test_a_folder_that_cannot_be_read_is_named_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("A")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):  # deeper than a path may be long, which stops root as well
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    try:
        with pytest.raises(DataError, match=r"cannot be read .File name too long.; "):
            find_inputs([tmp_path], "text")
    finally:
        shutil.rmtree(tmp_path / ("d" * 250))
