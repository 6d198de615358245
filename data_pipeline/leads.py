"""Pairs from encyclopedia articles: the lead is the summary, what follows is the source.

An article, and where it is cut::

    Ants are insects ...          target: the lead
    == Morphology ==              source: the sections up to
    Ants are distinct ...
    == See also ==                the first that is no prose of the article's own
"""

from __future__ import annotations

import re

from haloformer.data_pipeline.wikitext import clean_wikitext

_HEADING = re.compile(r"^==([^=\n][^\n]*?)==[ \t]*$", re.MULTILINE)
_APPENDICES = (
    *("references", "notes", "footnotes", "citations", "sources", "notes and references"),
    *("bibliography", "see also", "external links", "further reading"),
)
# A stub's lead says all there is; below this an article is no document with a summary.
MIN_LEAD_WORDS = 40


def split_lead(wikitext: str, *, keep_markup: bool = False) -> tuple[str, str] | None:
    """Cut an article into body and lead.

    Args:
        wikitext: The article as the dump has it.
        keep_markup: Leave wiki markup as it is.

    Returns:
        Source and target, or None where an article has no headings, a lead of fewer than 40 words,
        or a body that is no longer than its lead.
    """
    first = _HEADING.search(wikitext)
    if first is None:
        return None
    end = len(wikitext)
    for heading in _HEADING.finditer(wikitext):
        if heading[1].strip().lower() in _APPENDICES:
            end = heading.start()
            break
    lead, body = wikitext[: first.start()], wikitext[first.start() : end]
    if not keep_markup:
        lead, body = clean_wikitext(lead), clean_wikitext(body)
    num_words = len(lead.split())
    if num_words < MIN_LEAD_WORDS or len(body.split()) <= num_words:
        return None
    return body, lead
