"""Packs document spans into sequences; only places are decided here, nothing is read.

Joined ("full sentences", as AI2 pretrained Longformer): one <s>, documents run on with a </s>
between them, one </s> at the end. Documents A (4 tokens left) and B:

    slot      0   1  2  3  4    5    6  7   8
    joined    <s> a  a  a  a  </s>   b  b  </s>      one segment, one global token (slot 0)
    isolated  <s> a  a  a  a  </s>  <s> b  </s>      two segments, global tokens 0 and 6

A document that does not fit goes on in the stream's next sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from haloformer.data_pipeline.reader import ShardReader
from haloformer.data_pipeline.tokenizers import Specials

NO_SEGMENT = -1


class Span(NamedTuple):
    """Tokens start .. stop-1 of one document, as read in one epoch."""

    epoch: int
    shard: int
    sample: int
    start: int
    stop: int


class Piece(NamedTuple):
    """A span, and whether nothing of this document follows it in the stream."""

    span: Span
    ends: bool


# Gives the next piece of at most so many tokens, or None when there is no more text.
Take = Callable[[int], Piece | None]


@dataclass(slots=True)
class Layout:
    """Where everything stands in one sequence. The slots from ``num_used`` on are padding."""

    bos: list[int] = field(default_factory=list)
    eos: list[int] = field(default_factory=list)
    spans: list[tuple[int, Span]] = field(default_factory=list)
    num_used: int = 0


def pack_joined(take: Take, seq_len: int) -> Layout | None:
    """Lay out one sequence of running documents; None when there is no more text."""
    layout, slot, last = Layout(bos=[0]), 1, seq_len - 1
    while slot < last:
        piece = take(last - slot)
        if piece is None:
            break
        layout.spans.append((slot, piece.span))
        slot += piece.span.stop - piece.span.start
        if piece.ends:
            layout.eos.append(slot)
            slot += 1
    if not layout.spans:
        return None
    # A document that ended has left its </s>; one that was cut at the last slot gets one there.
    if slot == last:
        layout.eos.append(last)
        slot += 1
    layout.num_used = slot
    return layout


def pack_isolated(take: Take, seq_len: int) -> Layout | None:
    """Lay out one sequence whose document pieces do not see each other; None at the end."""
    layout, slot = Layout(), 0
    while seq_len - slot >= 3:
        piece = take(seq_len - slot - 2)
        if piece is None:
            break
        num_tokens = piece.span.stop - piece.span.start
        layout.bos.append(slot)
        layout.spans.append((slot + 1, piece.span))
        layout.eos.append(slot + 1 + num_tokens)
        slot += num_tokens + 2
    layout.num_used = slot
    return layout if layout.spans else None


def fill(
    layout: Layout, reader: ShardReader, specials: Specials, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Read the spans of a layout.

    Args:
        layout: What stands where.
        reader: Where the tokens are.
        specials: Ids of <s>, </s> and <pad>.
        width: Slots of the row, at least ``layout.num_used``.

    Returns:
        Token ids int64 [width] and segment numbers int32 [width] (-1 on padding). A segment begins
        at each <s>.
    """
    ids = np.empty(width, np.int64)
    for slot, span in layout.spans:
        tokens = reader.read(span.shard, span.sample, span.start, span.stop)
        ids[slot : slot + len(tokens)] = tokens
    ids[layout.bos] = specials.bos
    ids[layout.eos] = specials.eos
    ids[layout.num_used :] = specials.pad
    segments = np.empty(width, np.int32)
    stops = [*layout.bos[1:], layout.num_used]
    for number, (start, stop) in enumerate(zip(layout.bos, stops, strict=True)):
        segments[start:stop] = number
    segments[layout.num_used :] = NO_SEGMENT
    return ids, segments
