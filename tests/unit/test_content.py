"""What content has in common: the kept header section, and when a size is hopeless."""

from __future__ import annotations

import re
from itertools import product

import pytest

from relay.content import MAX_HEADER, MAX_RECEIVED_OVERSHOOT, Header, clean, far_beyond


def test_clean_is_what_has_its_newlines_in_pairs_and_no_nul() -> None:
    pattern = re.compile(rb"(?:[^\r\n\0]|\r\n)*")
    for length in range(8):
        for octets in product(b"\r\n\0a", repeat=length):
            content = bytes(octets)
            assert clean(content) is (pattern.fullmatch(content) is not None), content


@pytest.mark.parametrize("cut", range(20))
def test_the_header_section_ends_with_an_empty_line(cut: int) -> None:
    content = b"A: 1\r\n 2\r\n\r\nbody\r\n\r\n"
    header = Header()
    for piece in (content[:cut], content[cut:]):
        if not header.complete:
            header.keep(piece)
    assert (header.octets, header.complete) == (b"A: 1\r\n 2", True)


def test_an_empty_header_section() -> None:
    header = Header()
    header.keep(b"\r")
    assert not header.complete
    header.keep(b"\nbody")
    assert (header.octets, header.complete) == (b"", True)


def test_it_is_complete_at_its_end_or_its_bound() -> None:
    header = Header()
    header.keep(b"A: 1")
    header.end()
    assert (header.octets, header.complete) == (b"A: 1", True)
    header = Header()
    header.keep(b"x" * MAX_HEADER * 2)
    assert (len(header.octets), header.complete) == (MAX_HEADER, True)


def test_far_beyond_a_limit() -> None:
    assert not far_beyond(10**12, 0)
    assert not far_beyond(150 + MAX_RECEIVED_OVERSHOOT, 100)
    assert far_beyond(151 + MAX_RECEIVED_OVERSHOOT, 100)
