"""The strict end of data of the tests' own upstream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.content import ContentScanner, stuff, unstuff

LOOKALIKES = (
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r\r\n.\n",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
)


def scan(*pieces: bytes) -> tuple[bytes, bytes | None]:
    scanner = ContentScanner()
    content = b""
    rest = None
    for piece in pieces:
        if rest is None:
            sure, rest = scanner.feed(piece)
            content += sure
        else:
            rest += piece
    return content, rest


def test_empty_content() -> None:
    assert scan(b".\r\nQUIT\r\n") == (b"", b"QUIT\r\n")


def test_content_keeps_its_last_line_end() -> None:
    assert scan(b"a\r\n.\r\n") == (b"a\r\n", b"")


def test_blank_line_alone() -> None:
    assert scan(b"\r\n.\r\n") == (b"\r\n", b"")


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_nothing_else_ends_it(lookalike: bytes) -> None:
    text = b"a" + lookalike + b"b\r\n"
    assert scan(text + b".\r\n") == (text, b"")


pieces = st.lists(st.sampled_from([b"\r", b"\n", b".", b"a", b"\r\n", b"\r\n."]), max_size=20)


@given(pieces)
def test_cuts_do_not_matter(cut: list[bytes]) -> None:
    whole = b"".join(cut)
    assert scan(*cut, b"\r\n.\r\n", b"Z") == scan(whole + b"\r\n.\r\nZ")


@given(pieces)
def test_stuffed_content_comes_back_whole(cut: list[bytes]) -> None:
    content = b"".join(cut)
    if not content.endswith(b"\r\n"):
        content += b"x\r\n"
    wire, rest = scan(stuff(content) + b".\r\nZ")
    assert (unstuff(wire), rest) == (content, b"Z")
