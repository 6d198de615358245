"""Papers and their abstracts (Cohan et al. 2018): train.txt, val.txt and test.txt, JSON a line."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from haloformer.data_pipeline.records import Found, LeftOut, Pair, text_of, texts_of
from haloformer.data_pipeline.source_files import InputFile, json_lines

_SENTENCE_MARK = re.compile(r"</?S>")


def read_arxiv(stream: io.BufferedIOBase, file: InputFile) -> Iterator[Found]:
    """Pairs of an article's text and its abstract, a sentence a line; arXiv's and PubMed's.

    A few of the published papers have no text or no abstract: they are left out.
    """
    for place, number, record in json_lines(stream, file):
        origin = f"{file.name}:{number} {text_of(record, 'article_id', place, 'arxiv')}"
        source = "\n".join(texts_of(record, "article_text", place, "arxiv"))
        marked = texts_of(record, "abstract_text", place, "arxiv")
        target = "\n".join(_SENTENCE_MARK.sub("", sentence).strip() for sentence in marked)
        filled = source.strip() and target.strip()
        yield Found(Pair(source, target) if filled else LeftOut("no text or abstract"), origin)
