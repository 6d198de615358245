from __future__ import annotations

from collections.abc import Iterator

import pytest

from haloformer.data_pipeline.packing import Piece, Span, Take, pack_isolated, pack_joined


def take_from(lengths: list[int]) -> Take:
    """Documents of these lengths, one after the other."""
    left = [(number, 0, length) for number, length in enumerate(lengths)]

    def take(room: int) -> Piece | None:
        if not left:
            return None
        number, start, length = left.pop(0)
        stop = min(start + room, length)
        if stop < length:
            left.insert(0, (number, stop, length))
        return Piece(Span(0, 0, number, start, stop), stop == length)

    return take


def sequences(pack, lengths: list[int], seq_len: int) -> Iterator[str]:
    """Draw sequences: < is <s>, > is </s>, a letter is a token of that document, . is padding."""
    take = take_from(lengths)
    while (layout := pack(take, seq_len)) is not None:
        drawn = ["."] * seq_len
        for slot, span in layout.spans:
            assert span.stop > span.start
            for at in range(span.stop - span.start):
                assert drawn[slot + at] == "."
                drawn[slot + at] = chr(ord("a") + span.sample)
        for slots, sign in ((layout.bos, "<"), (layout.eos, ">")):
            for slot in slots:
                assert drawn[slot] == "."
                drawn[slot] = sign
        assert "." not in drawn[: layout.num_used] and set(drawn[layout.num_used :]) <= {"."}
        yield "".join(drawn)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4, 3], ["<aaaa>b>", "<bb>...."]),
        ([6, 2], ["<aaaaaa>", "<bb>...."]),
        ([5, 2], ["<aaaaa>>", "<bb>...."]),
        ([1, 1, 1, 1], ["<a>b>c>>", "<d>....."]),
        ([14], ["<aaaaaa>", "<aaaaaa>", "<aa>...."]),
        ([], []),
    ],
)
def test_joined_documents_run_on_with_a_separator(lengths, expected) -> None:
    assert list(sequences(pack_joined, lengths, 8)) == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4, 3], ["<aaaa>..", "<bbb>..."]),
        ([3, 3], ["<aaa><b>", "<bb>...."]),
        ([1, 1, 1, 1], ["<a><b>..", "<c><d>.."]),
        ([14], ["<aaaaaa>", "<aaaaaa>", "<aa>...."]),
        ([], []),
    ],
)
def test_isolated_pieces_stand_between_their_own_specials(lengths, expected) -> None:
    assert list(sequences(pack_isolated, lengths, 8)) == expected
