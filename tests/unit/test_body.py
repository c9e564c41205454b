"""The body module: byte-exact when clean, mended or refused when not, whatever way TCP cuts it.

Exhaustively, against models of lenient receivers, it is tested in `property/test_smuggling.py`.
"""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.body import Body
from relay.content import MAX_HEADER, Fault


def carry(
    octets: bytes, *, cuts: tuple[int, ...] = (), max_size: int = 0, normalize: bool = True
) -> tuple[Body, bytes]:
    """Feed `octets`, cut at the given offsets, until the end of data; return the body and what went out."""
    body = Body(max_size=max_size, normalize=normalize)
    out = b""
    bounds = [0, *sorted(cuts), len(octets)]
    for start, stop in itertools.pairwise(bounds):
        if body.ended:
            body.rest += octets[start:stop]
        elif stop > start:
            out += body.feed(octets[start:stop])
    return body, out


def unstuffed(wire: bytes) -> bytes:
    return re.sub(rb"(^|\r\n)\.", rb"\1", wire)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Subject: x\r\n\r\nhello\r\n",
        b"..\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"..one dot\r\n...two\r\n",
        b"caf\xc3\xa9 \xff\xfe \x0b\x0c\x1c\x85\r\n",
        b"trailing blanks   \r\n\t\r\n",
        b"x" * 5000 + b"\r\n",
    ],
)
def test_a_clean_message_passes_octet_for_octet_in_every_two_way_split(content: bytes) -> None:
    wire = content + b".\r\n"
    for cut in range(len(wire) + 1) if len(wire) < 100 else (0, 1, 4998, 5000, 5001, 5002):
        body, out = carry(wire, cuts=(cut,))
        assert body.ended
        assert body.fault is None
        assert out == content
        assert body.rest == b""
        assert body.size == len(unstuffed(content))
        assert body.received == len(content)


def test_octets_behind_the_end_are_left_for_the_session() -> None:
    body, out = carry(b"a\r\n.\r\nQUIT\r\n")
    assert (out, body.rest, body.received) == (b"a\r\n", b"QUIT\r\n", 3)


@pytest.mark.parametrize(
    "false_end",
    [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r\n.\r\r\n"],
)
def test_nothing_but_crlf_dot_crlf_ends_the_message(false_end: bytes) -> None:
    wire = b"one" + false_end + b"MAIL FROM:<evil@foreign.example>\r\n.\r\n"
    body, out = carry(wire)
    assert body.ended
    assert b"MAIL FROM" in out
    assert b"\r\n.\r\n" not in b"\r\n" + out
    refused, nothing = carry(wire, normalize=False)
    assert refused.ended
    assert refused.fault is Fault.STRAY_NEWLINE
    assert b"MAIL FROM" not in nothing


@pytest.mark.parametrize(
    ("stray", "mended"),
    [
        (b"a\nb\r\n", b"a\r\nb\r\n"),
        (b"a\n.b\r\n", b"a\r\n..b\r\n"),
        (b"a\n.\r\nb\r\n", b"a\r\n..\r\nb\r\n"),
        (b"a\n..b\n...\n.\n..\r\n", b"a\r\n..b\r\n...\r\n..\r\n..\r\n"),
        (b"a\rb\r\n", b"a b\r\n"),
        (b"a\r\r\nb\r\n", b"a \r\nb\r\n"),
        (b".\nb\r\n", b"\r\nb\r\n"),
        (b"..\nb\r\n", b"..\r\nb\r\n"),
        (b"\n\n\r\n", b"\r\n\r\n\r\n"),
    ],
)
def test_stray_newlines_are_mended_the_same_in_every_two_way_split(stray: bytes, mended: bytes) -> None:
    wire = stray + b".\r\n"
    for cut in range(len(wire) + 1):
        body, out = carry(wire, cuts=(cut,))
        assert body.ended
        assert out == mended, cut
        assert body.size == len(unstuffed(mended)), cut


def test_nul_is_a_fault_in_either_mode() -> None:
    for normalize in (True, False):
        body, out = carry(b"a\0b\r\n.\r\n", normalize=normalize)
        assert body.ended
        assert body.fault is Fault.NUL
        assert out == b""


@given(st.binary(max_size=200), st.lists(st.integers(0, 210), max_size=8), st.booleans())
def test_the_way_tcp_cuts_the_octets_does_not_matter(
    content: bytes, cuts: list[int], normalize: bool
) -> None:
    wire = content + b"\r\n.\r\n"
    whole, expected = carry(wire, normalize=normalize)
    cut, out = carry(wire, cuts=tuple(c for c in cuts if c < len(wire)), normalize=normalize)
    assert (cut.ended, cut.rest, cut.fault is None) == (whole.ended, whole.rest, whole.fault is None)
    if whole.fault is None:
        assert out == expected
        assert cut.header == whole.header


def test_the_size_limit_counts_content_without_stuffing() -> None:
    exact, _ = carry(b"..23456\r\n.\r\n", max_size=8)
    assert exact.fault is None
    assert exact.size == 8
    over, out = carry(b"1234567\r\n.\r\nNOOP\r\n", max_size=8)
    assert over.ended
    assert over.fault is Fault.TOO_LARGE
    assert (out, over.rest) == (b"", b"NOOP\r\n")


def test_a_message_far_beyond_the_limit_is_hopeless() -> None:
    body = Body(max_size=1000, normalize=True)
    for _ in range(40):
        body.feed(b"x" * 65536)
    assert body.fault is Fault.TOO_LARGE
    assert body.hopeless


@pytest.mark.parametrize("cut", range(1, 30))
def test_the_header_section_is_kept_without_its_empty_line(cut: int) -> None:
    body, _ = carry(b"A: 1\r\nB: 2\r\n 3\r\n\r\nbody\r\n.\r\n", cuts=(cut,))
    assert body.header == b"A: 1\r\nB: 2\r\n 3"
    assert body.header_complete


def test_a_message_without_header_or_without_body() -> None:
    assert carry(b"\r\nbody\r\n.\r\n")[0].header == b""
    assert carry(b"A: 1\r\n.\r\n")[0].header.rstrip() == b"A: 1"


def test_the_kept_header_is_bounded() -> None:
    body, out = carry(b"A: " + b"x" * 200_000 + b"\r\n.\r\n")
    assert len(body.header) == MAX_HEADER
    assert len(out) == 200_005
