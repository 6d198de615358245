"""The command line of ``prepare``: arguments, progress, summary."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from haloformer.data_pipeline.index import ShardIndex
from haloformer.data_pipeline.prepare import (
    DEFAULT_HOLDOUT,
    DEFAULT_SHARD_TOKENS,
    Prepared,
    Progress,
    prepare,
)
from haloformer.data_pipeline.sources import FORMATS

DESCRIPTION = "Turn text into tar shards of tokenised documents, split into train and eval."
EPILOG = """example:
  haloformer prepare --input enwiki.xml.bz2 --format mediawiki --tokenizer train:8192 \\
      --output data/enwiki
  haloformer prepare --input papers.jsonl --format pairs --tokenizer train:8192 --output data/papers
  haloformer prepare --input books/ --format text --tokenizer byte --output data/books
  haloformer prepare --input enwik8 --format enwik8 --tokenizer byte --output data/enwik8
  haloformer prepare --input aclImdb/train --format imdb --tokenizer roberta-base --holdout 0 \\
      --output data/imdb

The same request again finds its result and returns at once. A file of --format text is one
document; to train on a dump as it is, markup and all, give the .xml as text.

Published data sets bring their own dev files: prepare each with --holdout 0 and the tokenizer of
the training set, and let data.eval name the train folder of the dev file. Of these formats:
  enwik8, text8  one file of raw bytes; the last --holdout of it is DIR/test, the share before
                 that DIR/eval (90 : 5 : 5); a document is 16 MiB
  arxiv          JSON lines of Cohan et al. 2018 (arXiv, PubMed): papers and their abstracts
  imdb           a folder with neg/ and pos/
  hyperpartisan  articles-*.xml of SemEval-2019 task 4, ground-truth-*.xml beside it
  triviaqa       qa/*.json of triviaqa-rc, the folder evidence/ beside qa/
  hotpotqa       hotpot_*.json; "yes no" stands before the paragraphs, so that they can be answers
  wikihop        train.json or dev.json of QAngaroo
  conll2012      *_gold_conll files, or a folder of them"""
_LINE_EVERY_S = 5.0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``prepare``."""
    parser = commands.add_parser("prepare", help="turn text into tar shards of tokens")
    add_arguments(parser)
    parser.set_defaults(run_command=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prepare`` to a parser, with help and an example."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="PATH",
        help="files, or folders that hold them; .gz and .bz2 are opened",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, required=True,
        help="text: one document per file; jsonl: key `text`; mediawiki: XML dump, articles only; "
        "pairs: JSONL, keys `source` and `target`; mediawiki_lead: pairs of an article's sections "
        "and its lead; published data sets: see below",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", required=True, metavar="byte|train:N|PATH",
        help="bytes; byte-level BPE of N tokens trained on this input; or a folder with "
        "vocab.json and merges.txt",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--holdout", type=float, default=DEFAULT_HOLDOUT, metavar="SHARE",
        help="share of documents for DIR/eval (default %(default)s), of enwik8 and text8 "
        "also for DIR/test; 0 makes no eval part",
    )  # fmt: skip
    parser.add_argument(
        "--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N",
        help="most tokens in one shard (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep-markup", action="store_true", help="leave wiki markup as it is")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data set made by another request"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``prepare`` with parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        DataError: On bad input; one line that says what to do.
    """
    with _reporter(sys.stderr.isatty()) as report:
        result = prepare(
            args.input,
            source_format=args.format,
            tokenizer=args.tokenizer,
            output=args.output,
            holdout=args.holdout,
            shard_tokens=args.shard_tokens,
            keep_markup=args.keep_markup,
            overwrite=args.overwrite,
            progress=report,
        )
    print(json.dumps(_summary(result)) if args.json else _sentence(result))
    return 0


def _part(index: ShardIndex | None) -> dict[str, object] | None:
    if index is None:
        return None
    return {
        "folder": str(index.folder),
        "documents": index.num_samples,
        "tokens": index.num_tokens,
        "bytes": index.num_bytes,
        "shards": len(index.shards),
        "sha256": index.sha256,
    }


def _summary(result: Prepared) -> dict[str, object]:
    return {
        "reused": result.reused,
        "seconds": round(result.seconds, 3),
        "tokenizer": result.train.tokenizer_kind,
        "vocab_size": result.train.vocab_size,
        "bytes_per_token": result.train.bytes_per_token,
        "train": _part(result.train),
        "eval": _part(result.eval),
        "test": _part(result.test),
        "left_out": result.left_out,
    }


def _sentence(result: Prepared) -> str:
    parts = [
        f"{index.folder}: {index.num_samples} {index.content}, {index.num_tokens} tokens, "
        f"{len(index.shards)} shards"
        for index in (result.train, result.eval, result.test)
        if index is not None
    ]
    parts += [f"left out: {count} records, {why}" for why, count in result.left_out.items()]
    verb = "is there already (same request)" if result.reused else f"made in {result.seconds:.1f} s"
    train = result.train
    parts.append(
        f"{result.folder} {verb}; {train.tokenizer_kind} tokenizer of {train.vocab_size} tokens, "
        f"{train.bytes_per_token:.2f} bytes per token"
    )
    return "\n".join(parts)


@contextmanager
def _reporter(on_terminal: bool) -> Iterator[Callable[[Progress], None]]:
    """Bars on a terminal; else a line every few seconds."""
    if not on_terminal:
        yield _line_printer()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(at: Progress) -> None:
            if at.phase not in tasks:
                tasks[at.phase] = bars.add_task(at.phase, total=at.bytes_total)
            text = f"{at.phase} {at.num_documents} documents"
            bars.update(tasks[at.phase], completed=at.bytes_read, description=text)

        yield show


def _line_printer() -> Callable[[Progress], None]:
    printed = time.monotonic()

    def show(at: Progress) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _LINE_EVERY_S:
            printed = time.monotonic()
            share = 100 * at.bytes_read // at.bytes_total
            line = f"{at.phase}: {share} %, {at.num_documents} documents, {at.num_tokens} tokens"
            print(line, file=sys.stderr, flush=True)

    return show
