"""Wikitext -> readable prose: a modest cleaner, in time linear in the text.

    '''Anarchism''' is a [[political philosophy|philosophy]].<ref>{{cite}}</ref>
    -> Anarchism is a philosophy.

Templates, tables, references, pictures and categories go; links keep their label; headings and
list items become plain lines. Markup that never closes stays in the text.
"""

from __future__ import annotations

import html
import re
from collections import Counter

# Tags whose whole content goes.
_DROPPED_TAGS = "ref|math|gallery|timeline|imagemap|source|syntaxhighlight|score|chem|hiero|graph"
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_TOKEN = re.compile(
    r"(?P<open_template>\{\{)|(?P<close_template>\}\})"
    r"|(?P<open_table>^[ \t:]*\{\|)|(?P<close_table>^[ \t]*\|\}(?!\}))"
    r"|(?P<open_link>\[\[)|(?P<close_link>\]\])"
    rf"|<(?P<open_tag>{_DROPPED_TAGS})\b[^<>]*?(?P<empty>/?)>|</(?P<close_tag>{_DROPPED_TAGS})\s*>",
    re.MULTILINE | re.IGNORECASE,
)
_DROPPED_LINK = re.compile(r"\s*(?:file|image|media|category)\s*:", re.IGNORECASE)
_LANGUAGE_LINK = re.compile(r"\s*[a-z]{2,3}(?:-[a-z]+)*\s*:", re.IGNORECASE)
# Possessive: nothing is tried again where the link never closes.
_EXTERNAL_LINK = re.compile(
    r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*+\s*+([^\[\]]*+)\]", re.IGNORECASE
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_QUOTES = re.compile(r"'{2,5}")
_MAGIC = re.compile(r"__[A-Z]{3,}__")
_HEADING = re.compile(r"^=[^\n]*=[ \t]*$", re.MULTILINE)
_LIST = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_BLANKS = re.compile(r"[ \t\xa0]+")
_EMPTY_BRACKETS = re.compile(r" ?\((?:[ ,;]*)\)")
_LINE_ENDS = re.compile(r" ?\n ?")
_NEWLINES = re.compile(r"\n{3,}")
# Deeper nesting is not an article; without a limit copying nested links would be quadratic.
_MAX_DEPTH = 50


def clean_wikitext(text: str) -> str:
    """Turn the wikitext of one article into prose, paragraphs separated by an empty line."""
    text = _COMMENT.sub("", text)
    text = _drop_nested(text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _TAG.sub("", text)
    text = _MAGIC.sub("", _QUOTES.sub("", text))
    text = _HEADING.sub(_heading_title, text)
    text = _LIST.sub("", text)
    text = html.unescape(text)
    text = _BLANKS.sub(" ", text)
    text = _EMPTY_BRACKETS.sub("", text)
    text = _LINE_ENDS.sub("\n", text)
    return _NEWLINES.sub("\n\n", text).strip()


def _drop_nested(text: str) -> str:
    """Resolve everything that nests, in one pass with a stack of what is open.

    a {{b [[c]] d}} e: "{{" opens at piece 1; "}}" cuts the pieces back to 1 -> "a " + " e".
    """
    pieces: list[str] = []
    stack: list[tuple[str, int]] = []  # what was opened, and the piece it starts at
    num_open: Counter[str] = Counter()
    done = 0
    for token in _TOKEN.finditer(text):
        pieces.append(text[done : token.start()])
        done = token.end()
        action, kind = _classify(token)
        if action == "empty":
            continue
        if action == "open" and len(stack) < _MAX_DEPTH:
            stack.append((kind, len(pieces)))
            num_open[kind] += 1
            pieces.append(token.group())
        elif action == "close" and num_open[kind]:
            start = len(pieces)
            opened = ""
            while opened != kind:  # what was opened inside and never closed ends here too
                opened, start = stack.pop()
                num_open[opened] -= 1
            content = "".join(pieces[start + 1 :]) if kind == "link" else ""
            del pieces[start:]
            if kind == "link":
                pieces.append(_link_label(content))
        else:
            pieces.append(token.group())
    pieces.append(text[done:])
    return "".join(pieces)


def _classify(token: re.Match[str]) -> tuple[str, str]:
    group = token.lastgroup
    if token["open_tag"] is not None:
        return ("empty" if token["empty"] else "open"), token["open_tag"].lower()
    if token["close_tag"] is not None:
        return "close", token["close_tag"].lower()
    assert group is not None
    action, _, kind = group.partition("_")
    return action, kind


def _heading_title(heading: re.Match[str]) -> str:
    """The title alone, on a line of its own: up to six "=" before it go, and all behind it."""
    line = heading[0].rstrip(" \t")
    level = min(len(line) - len(line.lstrip("=")), len(line) - 1, 6)
    title = line[level:].rstrip("=").strip(" \t")
    return f"\n{title}\n"


def _link_label(content: str) -> str:
    target, bar, label = content.partition("|")
    if _DROPPED_LINK.match(target) or (not bar and _LANGUAGE_LINK.match(target)):
        return ""
    return label if bar and label else target.lstrip(":")
