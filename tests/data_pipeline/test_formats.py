"""Readers of published data sets, each on records as they are published."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.records import LeftOut, Pair
from haloformer.data_pipeline.sources import (
    SourceFormat,
    content_of,
    find_inputs,
    iter_documents,
    labels_of,
)

ARXIV = {
    "article_id": "1401.1234",
    "article_text": ["additive models @xcite are popular .", "we study them ."],
    "abstract_text": ["<S> we study additive models . </S>", "<S> they work . </S>"],
    "labels": None,
    "section_names": ["introduction"],
    "sections": [["additive models @xcite are popular .", "we study them ."]],
}
TRIVIA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Sunset Blvd", "West Sunset Boulevard", "Sunset Boulevard"],
                "MatchedWikiEntityName": "Sunset Boulevard",
                "NormalizedAliases": ["sunset boulevard", "west sunset boulevard", "sunset blvd"],
                "NormalizedMatchedWikiEntityName": "sunset boulevard",
                "NormalizedValue": "sunset boulevard",
                "Type": "WikipediaEntity",
                "Value": "Sunset Boulevard",
            },
            "EntityPages": [
                {
                    "DocSource": "TagMe",
                    "Filename": "Andrew_Lloyd_Webber.txt",
                    "Title": "Andrew Lloyd Webber",
                },
                {"DocSource": "TagMe", "Filename": "Lost.txt", "Title": "Lost"},
            ],
            "Question": "Which Lloyd Webber musical premiered in the US in 1993?",
            "QuestionId": "tc_33",
            "QuestionSource": "http://www.triviacountry.com/",
        }
    ],
    "Domain": "Wikipedia",
    "Split": "dev",
    "VerifiedEval": False,
    "Version": 1.0,
}
EVIDENCE = "He wrote SUNSET BOULEVARD.\n\nWest Sunset Boulevard, not Sunset Boulevards, is long."
HOTPOT = [
    {
        "_id": "5a8b57f25542995d1e6f1371",
        "answer": "yes",
        "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
        "supporting_facts": [["Scott Derrickson", 0], ["Ed Wood", 0]],
        "context": [
            ["Scott Derrickson", ["Scott Derrickson is an American director.", " Oh yes."]],
            ["Ed Wood", ["Edward Davis Wood Jr. was an American filmmaker."]],
        ],
        "type": "comparison",
        "level": "hard",
    },
    {
        "_id": "5a8c7595554299585d9e36b6",
        "answer": "Chief of Protocol",
        "question": "What position was held by the woman who played Corliss Archer?",
        "supporting_facts": [["Shirley Temple", 1]],
        "context": [["Shirley Temple", ["An actress.", " She was also Chief of Protocol."]]],
        "type": "bridge",
        "level": "hard",
    },
]
WIKIHOP = [
    {
        "id": "WH_train_0",
        "query": "participant_of juan rossell",
        "answer": "olympic games",
        "candidates": ["1996 summer olympics", "olympic games", "sport"],
        "supports": ["Juan ( born 1969 in Jiguani , Granma ) played men 's volleyball .", "Cuba ."],
    }
]
ARTICLES = """<?xml version="1.0" encoding="UTF-8"?>
<articles xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
<article id="0000001" published-at="2017-09-10" title="Kucinich: &quot;Money&quot;"><p>From \
<a href="http://x.org" type="external">flickr.com</a>: Money &amp;#160;talks</p>

<q>It &amp;lt;b&amp;gt;does&amp;lt;/b&amp;gt;; 1 &amp;lt; 2</q></article>
<article id="0000002" title="Plain"><p>Two.</p><p>Three.</p></article>
</articles>"""
TRUTH = """<?xml version="1.0"?>
<ground-truth>
  <article hyperpartisan="true" id="0000001" labeled-by="article" url="https://x.org/a"/>
  <article bias="least" hyperpartisan="false" id="0000002" labeled-by="publisher" url="y"/>
</ground-truth>"""
WORD = "nw/wsj/00/wsj_0020  0  {}  {:<8}  NNP  (TOP(S(NP*  -  -  -  speaker1  (PERSON)  *  {}"
WORDS = [
    *[("Ann", "(3)"), ("saw", "-"), ("her", "(3)|(7"), ("big", "-"), ("dog", "7)"), ("/.", "-")],
    ("", ""),
    *[("It", "(7)"), ("bit", "-"), ("Ann", "((3"), ("'s", "3)"), ("aunt", "12)")],
]
CONLL = "\n".join(
    [
        "#begin document (nw/wsj/00/wsj_0020); part 000",
        *(WORD.format(n, word, mark) if word else "" for n, (word, mark) in enumerate(WORDS)),
        "",
        "#end document",
        "#begin document (nw/wsj/00/wsj_0020); part 001",
        WORD.format(0, "Bye", "-"),
        "#end document",
    ]
).replace("((3", "(12|(3")


def read(path: Path, source_format: SourceFormat) -> list:
    files = find_inputs([path], source_format)
    return [document.body for document in iter_documents(files, source_format)]


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def spanned(example: Annotated) -> list[tuple[str, int]]:
    text = example.segments[-1]
    return [(text[start:stop], group) for start, stop, group in example.spans]


def test_arxiv_papers_become_pairs_without_sentence_marks(tmp_path: Path) -> None:
    empty = {**ARXIV, "article_text": []}
    path = write(tmp_path / "val.txt", "\n".join(map(json.dumps, [ARXIV, empty])))
    assert read(path, "arxiv") == [
        Pair(
            "additive models @xcite are popular .\nwe study them .",
            "we study additive models .\nthey work .",
        ),
        LeftOut("no text or abstract"),
    ]


@pytest.mark.parametrize("beside", ["qa/wikipedia-dev.json", "wikipedia-dev.json"])
def test_triviaqa_makes_an_example_of_each_question_and_document(beside, tmp_path: Path) -> None:
    write(tmp_path / "evidence" / "wikipedia" / "Andrew_Lloyd_Webber.txt", EVIDENCE)
    example, lost = read(write(tmp_path / beside, TRIVIA), "triviaqa")
    assert lost == LeftOut("no evidence file")
    question = TRIVIA["Data"][0]["Question"]  # type: ignore[index]
    assert example.segments == (question, EVIDENCE)
    assert example.note["id"] == "tc_33" and example.note["document"] == "Andrew_Lloyd_Webber.txt"
    assert example.note["answers"][:2] == ["Sunset Boulevard", "Sunset Blvd"]
    assert [text for text, _ in spanned(example)] == [
        "SUNSET BOULEVARD",
        "West Sunset Boulevard",
        "Sunset Boulevard",
    ]


def test_triviaqa_scores_a_web_question_with_its_document(tmp_path: Path) -> None:
    record = {k: v for k, v in TRIVIA["Data"][0].items() if k != "EntityPages"}  # type: ignore[index,attr-defined]
    page = {"Filename": "35/35_995.txt", "Rank": 0, "Title": "t", "Url": "u"}
    data = {"Data": [{**record, "EntityPages": [], "SearchResults": [page]}], "Domain": "Web"}
    write(tmp_path / "evidence" / "web" / "35" / "35_995.txt", "Nothing about it.")
    (example,) = read(write(tmp_path / "qa" / "web-dev.json", data), "triviaqa")
    assert example.note["id"] == "tc_33--35/35_995.txt" and example.spans == ()


def test_hotpotqa_has_yes_and_no_before_the_paragraphs(tmp_path: Path) -> None:
    yes, found = read(write(tmp_path / "hotpot_dev_distractor_v1.json", HOTPOT), "hotpotqa")
    text = yes.segments[1]
    assert text.startswith("yes no\nScott Derrickson\nScott Derrickson is an American director. Oh")
    assert [(span.start, span.stop) for span in yes.spans] == [(0, 3)]
    assert spanned(found) == [("Chief of Protocol", 0)]
    assert found.note == {"id": HOTPOT[1]["_id"], "answers": ["Chief of Protocol"]}


def test_wikihop_has_candidates_and_documents_behind_the_query(tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "dev.json", WIKIHOP), "wikihop")
    assert example.segments == (
        " participant_of juan rossell",
        *(" 1996 summer olympics", " olympic games", " sport"),
        *(" Juan (born 1969 in Jiguani, Granma) played men's volleyball.", " Cuba."),
    )
    assert example.note == {"id": "WH_train_0", "label": 1, "num_candidates": 3}


def test_imdb_reviews_have_the_labels_of_their_folders_and_alternate(tmp_path: Path) -> None:
    for name, text in {
        "neg/0_3.txt": "Bad.<br /><br />Really.",
        "neg/10_1.txt": "Worse.",
        "pos/0_9.txt": "Good.",
        "pos/2_10.txt": "Best.",
        "unsup/0_0.txt": "Unlabelled.",
        "urls_pos.txt": "http://www.imdb.com/title/tt0453418/usercomments",
    }.items():
        write(tmp_path / "train" / name, text)
    files = find_inputs([tmp_path / "train"], "imdb")
    assert labels_of(files, "imdb") == ("neg", "pos")
    examples = read(tmp_path / "train", "imdb")
    assert [(e.note["id"], e.note["label"]) for e in examples] == [
        ("neg/0_3", "neg"), ("pos/0_9", "pos"), ("pos/2_10", "pos"), ("neg/10_1", "neg"),
    ]  # fmt: skip
    assert examples[0].segments == ("Bad.\n\nReally.",)
    with pytest.raises(DataError, match=r"holds no file like neg/0_3\.txt"):
        find_inputs([tmp_path], "imdb")  # both splits together
    with pytest.raises(DataError, match="holds only the label"):
        labels_of(find_inputs([tmp_path / "train" / "neg" / "0_3.txt"], "imdb"), "imdb")


def test_hyperpartisan_articles_meet_their_labels_and_lose_their_markup(tmp_path: Path) -> None:
    write(tmp_path / "ground-truth-training-byarticle-20181122.xml", TRUTH)
    path = write(tmp_path / "articles-training-byarticle-20181122.xml", ARTICLES)
    first, second = read(path, "hyperpartisan")
    assert first.segments == ('Kucinich: "Money"\nFrom flickr.com: Money talks\nIt does ; 1 < 2',)
    assert first.note == {"id": "0000001", "label": "true"}
    assert second.segments == ("Plain\nTwo.\nThree.",) and second.note["label"] == "false"


def test_a_compressed_ground_truth_is_opened_like_its_articles(tmp_path: Path) -> None:
    for name, text in (("articles-x.xml.gz", ARTICLES), ("ground-truth-x.xml.gz", TRUTH)):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    labels = [e.note["label"] for e in read(tmp_path / "articles-x.xml.gz", "hyperpartisan")]
    assert labels == ["true", "false"]


def test_a_long_run_of_blanks_in_a_review_costs_linear_time(tmp_path: Path) -> None:
    path = write(tmp_path / "neg" / "0_1.txt", "a" + " " * 60_000 + "b <br /> <br/>c")
    began = time.process_time()
    assert read(path, "imdb")[0].segments == ("a" + " " * 60_000 + "b\n\nc",)
    assert time.process_time() - began < 1.0


def test_conll_mentions_become_clusters_of_spans(tmp_path: Path) -> None:
    write(tmp_path / "data" / "wsj_0020.v4_gold_conll", CONLL)
    write(tmp_path / "data" / "wsj_0020.v4_auto_conll", "not read")
    first, second = read(tmp_path / "data", "conll2012")
    assert first.segments == ("Ann saw her big dog . It bit Ann 's aunt",)
    assert first.note == {"id": "nw/wsj/00/wsj_0020 000"}
    clusters: dict[int, list[str]] = {}
    for text, group in spanned(first):
        clusters.setdefault(group, []).append(text)
    assert sorted(clusters.values()) == [
        ["Ann", "her", "Ann 's"], ["Ann 's aunt"], ["her big dog", "It"],
    ]  # fmt: skip
    assert second.segments == ("Bye",) and second.spans == ()


def test_clusters_that_share_a_mention_are_one(tmp_path: Path) -> None:
    marks = ["(1)|(2)", "(1)", "(2)"]
    lines = [WORD.format(n, "w", mark) for n, mark in enumerate(marks)]
    begin = "#begin document (a); part 000"
    path = write(tmp_path / "x_gold_conll", "\n".join([begin, *lines, "#end document"]))
    assert [group for _, group in spanned(read(path, "conll2012")[0])] == [0, 0, 0]


BAD: list[tuple[SourceFormat, str, object, str]] = [
    ("arxiv", "val.txt", {"text": "a"}, r"val.txt:1: no string under the key \"article_id\""),
    ("arxiv", "val.txt", {**ARXIV, "abstract_text": "x"}, "no list of strings under .*abstract_te"),
    ("triviaqa", "qa/x.json", {"data": []}, 'x.json: no key "Data"; is it whole'),
    ("triviaqa", "qa/x.json", {"Data": [{"Question": "q"}]}, 'record 1: no string.*"QuestionId"'),
    (
        "triviaqa",
        "qa/x.json",
        {"Data": [{"Question": "q", "QuestionId": "i"}]},
        "record 1: there is no answer; test files have none",
    ),
    (
        "triviaqa",
        "qa/x.json",
        {"Data": [{**TRIVIA["Data"][0], "EntityPages": [{"Filename": "../../x"}]}]},  # type: ignore[index]
        "leads out of the evidence folder",
    ),
    ("hotpotqa", "x.json", json.dumps(HOTPOT)[:-3], "record 2: not JSON .Unterminated"),
    ("wikihop", "x.json", f"[{'1' * 5000}]", "x.json: record 1: not JSON .Exceeds the limit"),
    (
        "hotpotqa",
        "x.json",
        [HOTPOT[0], {**HOTPOT[1], "context": [["t"]]}],
        'record 2: "context" is',
    ),
    ("hotpotqa", "x.json", [{"_id": "1", "question": "q"}], "record 1: there is no answer"),
    ("wikihop", "x.json", [{**WIKIHOP[0], "answer": "x"}], "the answer 'x' is none of the candid"),
    ("wikihop", "x.json", WIKIHOP[0], r"x.json: found '\{' in place of '\['"),
    ("hyperpartisan", "articles-1.xml", ARTICLES[:-20], "not well-formed XML"),
    (
        "hyperpartisan",
        "articles-1.xml",
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><articles>&x;</articles>',
        "articles-1.xml:1: a document type declaration is not accepted",
    ),
    (
        "hyperpartisan",
        "articles-1.xml",
        '<articles><article id="9" title="t"/></articles>',
        "article '9' is not in ground-truth-1.xml",
    ),
    ("hyperpartisan", "articles-2.xml", ARTICLES, "there is no ground-truth-2.xml beside it"),
    ("hyperpartisan", "news.xml", ARTICLES, r"not named articles-\*.xml"),
    ("hyperpartisan", "articles-1.xml", "<html/>", "holds no <article>"),
    ("conll2012", "x_conll", "hello", "x_conll:1: 1 columns, not 12 or more"),
    ("conll2012", "x_conll", CONLL.replace("(7", "(x"), r"x_conll:4: '\(x' is no mark of a men"),
    (
        "conll2012",
        "x_conll",
        CONLL.replace("(3)|(7", "(3)"),
        "a mention of 7 ends that never began",
    ),
    ("conll2012", "x_conll", CONLL.replace("12)", "-"), "a mention of 12 never ends"),
    ("conll2012", "x_conll", CONLL[:-13], "the file ends before document nw/wsj/00/wsj_0020 001"),
]


@pytest.mark.parametrize(("source_format", "name", "content", "named"), BAD, ids=range(len(BAD)))
def test_anything_else_is_named_in_one_line(
    source_format, name, content, named, tmp_path: Path
) -> None:
    write(tmp_path / "evidence" / "wikipedia" / "Andrew_Lloyd_Webber.txt", EVIDENCE)
    write(tmp_path / "ground-truth-1.xml", TRUTH)
    with pytest.raises(DataError, match=named) as caught:
        read(write(tmp_path / name, content), source_format)
    assert Path(name).name in str(caught.value) and "\n" not in str(caught.value)


def test_triviaqa_without_evidence_and_folders_of_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*evidence or .*evidence; unpack"):
        read(write(tmp_path / "qa" / "x.json", TRIVIA), "triviaqa")
    with pytest.raises(DataError, match="it is a folder; name the file of one split itself"):
        read(tmp_path, "hotpotqa")


def test_every_format_says_what_it_holds() -> None:
    assert content_of("imdb") == content_of("hyperpartisan") == "classification"
    assert content_of("triviaqa") == content_of("hotpotqa") == "questions"
    assert (content_of("wikihop"), content_of("conll2012")) == ("choices", "coreference")
