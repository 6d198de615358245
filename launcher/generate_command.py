"""``haloformer generate``: an LED's answers to the documents of a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from haloformer.data_pipeline.documents import Asked, read_asked
from haloformer.launcher.counting import CountProgress, counted
from haloformer.launcher.export_command import add_run_options

if TYPE_CHECKING:
    from haloformer.launcher.summarizer import Summarizer
    from haloformer.model.generate import SearchSettings

_LONGEST_ANSWER = 142  # unless the model or the user says otherwise


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``generate``."""
    parser = commands.add_parser(
        "generate",
        help="summarise documents with a trained LED",
        description="Write an answer to every document of a file: a document per line, or in a "
        ".jsonl file an object per line with the document under 'source' or 'text'. <s> is the "
        "global token, unless the run was trained without. Answers come in the order of the "
        "documents, a line each, and are written as they are found; Ctrl-C keeps what is done.",
        epilog="example: haloformer generate latest --input reports.jsonl --output short.jsonl "
        "--beams 4 --max-length 256 --no-repeat-ngram-size 3",
    )
    parser.add_argument("model", metavar="RUN_ID|latest|HF_DIR")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="new file; .jsonl for JSON (default: print)"
    )
    parser.add_argument("--json", action="store_true", help="JSON lines whatever the name says")
    parser.add_argument("--beams", type=int, default=1, help="hypotheses; 1 is greedy (default)")
    parser.add_argument(
        "--max-length",
        type=int,
        help=f"most tokens of an answer, its start token included (default {_LONGEST_ANSWER})",
    )
    parser.add_argument("--min-length", type=int, default=0, help="least tokens of an answer")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="above 1: longer answers")
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, metavar="N")
    parser.add_argument("--early-stopping", action="store_true", help="stop at N finished beams")
    parser.add_argument("--batch", type=int, default=1, help="documents at once (default 1)")
    parser.add_argument("--truncate", action="store_true", help="cut documents that are too long")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: newest)")
    add_run_options(parser)
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0, or 130 if Ctrl-C ended it."""
    # torch takes seconds to load: a wrong word in the command need not wait for it.
    _check(arguments)
    from haloformer.launcher.summarizer import open_summarizer

    summarizer = open_summarizer(
        arguments.model, arguments.step, arguments.experiment, arguments.data
    )
    settings = _settings(arguments, summarizer.target_limit)
    # Before the first answer, which may be hours before the last: every document is looked at.
    total = _check_documents(arguments.input, summarizer, arguments.truncate)
    done, start = 0, time.perf_counter()
    progress = CountProgress("documents", total, every=10)
    try:
        with _open_output(arguments.output) as file, progress:
            for batch, texts in _answers(arguments, summarizer, settings):
                for asked, text in zip(batch, texts, strict=True):
                    file.write(_line(asked, text, _is_json(arguments)))
                file.flush()
                done += len(batch)
                progress.show(done)
    except KeyboardInterrupt:
        kept = ""
        if arguments.output is not None:
            done = _num_written(arguments.output)
            kept = f"; they are in {arguments.output}"
        print(f"stopped after {done} of {total} documents{kept}", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - start
    place = "" if arguments.output is None else f" -> {arguments.output}"
    answered = counted(done, "document")
    print(f"{summarizer.name}: {answered} in {seconds:.1f} s{place}", file=sys.stderr)
    return 0


def _answers(
    arguments: argparse.Namespace, summarizer: Summarizer, settings: SearchSettings
) -> Iterator[tuple[list[Asked], list[str]]]:
    """Batches of documents with their answers; an empty document has an empty answer."""
    documents = read_asked(arguments.input)
    while batch := list(islice(documents, arguments.batch)):
        real = [asked for asked in batch if asked.text.strip()]
        sources = [summarizer.cut(summarizer.encode(asked.text)) for asked in real]
        found = iter(summarizer.answer(sources, settings) if sources else [])
        yield batch, [next(found) if asked.text.strip() else "" for asked in batch]


def _check(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1:
        raise ValueError(f"--batch is {arguments.batch}; it must be at least 1")
    if not arguments.input.is_file():
        raise ValueError(f"--input {arguments.input}: no such file")
    output = arguments.output
    if output is not None and output.exists():
        raise ValueError(f"--output {output}: is there already; name a new file")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} to write {output.name} in; make it")


def _settings(arguments: argparse.Namespace, limit: int) -> SearchSettings:
    from haloformer.model.generate import SearchSettings

    longest = arguments.max_length
    if longest is None:
        longest = min(_LONGEST_ANSWER, limit)
    if longest > limit:
        raise ValueError(f"--max-length {longest} is more than the model's {limit} positions")
    return SearchSettings(
        max_length=longest,
        min_length=arguments.min_length,
        num_beams=arguments.beams,
        length_penalty=arguments.length_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        early_stopping=arguments.early_stopping,
    )


def _check_documents(path: Path, summarizer: Summarizer, may_cut: bool) -> int:
    """See that every document can be read and is short enough; returns how many there are."""
    total, limit = 0, summarizer.source_limit
    for asked in read_asked(path):
        total += 1
        if may_cut:
            continue
        length = len(summarizer.encode(asked.text))
        if length > limit:
            raise ValueError(
                f"{asked.place}: the document has {length} tokens, the model reads {limit}; "
                "shorten it, or add --truncate to read its beginning only"
            )
    if total == 0:
        raise ValueError(f"{path}: holds no document")
    return total


def _num_written(path: Path) -> int:
    """Answers in a file: Ctrl-C may come when one is written and not yet counted."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _is_json(arguments: argparse.Namespace) -> bool:
    named = arguments.output is not None and arguments.output.suffix == ".jsonl"
    return named or bool(arguments.json)


def _line(asked: Asked, text: str, as_json: bool) -> str:
    if as_json:
        return json.dumps({"line": asked.line, "output": text}, ensure_ascii=False) + "\n"
    return " ".join(text.split()) + "\n"


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with path.open("x", encoding="utf-8") as file:
        yield file
