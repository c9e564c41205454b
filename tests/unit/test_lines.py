"""Lines out of octets: CRLF only, bounded, the same however TCP cuts them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.session.lines import MAX_LINE, EndlessLineError, Lines, NotCrlfError


def split(pieces: list[bytes]) -> tuple[list[bytes], type[Exception] | None]:
    lines = Lines()
    found = []
    for piece in pieces:
        lines.feed(piece)
        try:
            while (line := lines.next()) is not None:
                found.append(line)
        except (NotCrlfError, EndlessLineError) as error:
            return found, type(error)
    return found, None


def test_lines_end_with_crlf_and_the_rest_waits() -> None:
    lines = Lines()
    lines.feed(b"NOOP\r\nQUIT\r\nMA")
    assert (lines.next(), lines.next(), lines.next()) == (b"NOOP", b"QUIT", None)
    assert lines.size == 2
    lines.feed(b"IL\r\n")
    assert lines.next() == b"MAIL"


def test_a_line_can_be_put_back_and_the_rest_taken_as_content() -> None:
    lines = Lines()
    lines.feed(b"DATA\r\ncontent\r\n")
    assert lines.next() == b"DATA"
    lines.back()
    assert lines.next() == b"DATA"
    assert lines.take() == b"content\r\n"
    assert lines.size == 0


def test_content_of_a_known_size_leaves_the_next_line() -> None:
    lines = Lines()
    lines.feed(b"BDAT 5\r\na\r\nb\nNOOP\r\nBDAT 9\r\nc")
    assert lines.next() == b"BDAT 5"
    assert lines.take(2) == b"a\r"
    assert lines.take(3) == b"\nb\n"
    assert (lines.next(), lines.next()) == (b"NOOP", b"BDAT 9")
    assert lines.take(9) == b"c"
    assert lines.size == 0


@pytest.mark.parametrize("octets", [b"a\nb\r\n", b"a\rb\r\n", b"\n", b"a\n", b"a\r\rb", b"a\r\r\n"])
def test_a_bare_cr_or_lf_is_an_error(octets: bytes) -> None:
    assert split([octets])[1] is NotCrlfError


def test_a_line_without_end_is_an_error_soon() -> None:
    assert split([b"a" * MAX_LINE + b"\r\n"]) == ([b"a" * MAX_LINE], None)
    assert split([b"a" * (MAX_LINE + 1)])[1] is EndlessLineError
    assert split([b"a" * (MAX_LINE + 1) + b"\r\n"])[1] is EndlessLineError


@given(st.text("ab\r\n", max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_the_way_tcp_cuts_the_octets_does_not_matter(text: str, cuts: list[int]) -> None:
    octets = text.encode() + b"x\r\n"
    bounds = sorted({0, len(octets), *(cut for cut in cuts if cut < len(octets))})
    pieces = [octets[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert split(pieces) == split([octets])
