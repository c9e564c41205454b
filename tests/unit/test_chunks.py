"""The chunks module: no octet changes, strays are found wherever chunks and TCP cut, sizes are believed."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.chunks import MAX_CHUNK, Chunks
from relay.content import MAX_HEADER, MAX_RECEIVED_OVERSHOOT, Fault


def carry(
    content: bytes, *borders: int, cuts: tuple[int, ...] = (), binary: bool = False
) -> tuple[Chunks, bytes]:
    """Carry `content` in chunks that end at `borders`, each fed in blocks that end at `cuts`."""
    chunks = Chunks(max_size=0, binary=binary)
    out = b""
    ends = [*sorted(borders), len(content)]
    for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        chunks.begin(end - start, last=number == len(ends) - 1)
        blocks = [start, *sorted(cut for cut in cuts if start < cut < end), end]
        for begin, stop in itertools.pairwise(blocks):
            if stop > begin:
                out += chunks.feed(content[begin:stop])
        assert chunks.left == 0
    assert chunks.ended
    return chunks, out


def strays(content: bytes) -> bool:
    """The oracle: what is left once every CRLF is taken out."""
    return re.search(rb"[\r\n\0]", content.replace(b"\r\n", b"")) is not None


def test_exhaustively_strays_are_found_wherever_chunks_meet_and_tcp_cuts() -> None:
    """All contents over CR, LF, NUL, dot and a letter to length 5, every border, every cut of each."""
    for length in range(6):
        for letters in itertools.product(b"\r\n\0.a", repeat=length):
            content = bytes(letters)
            for border, cut in itertools.product(range(length + 1), repeat=2):
                chunks, out = carry(content, border, cuts=(cut,))
                assert (chunks.fault is not None) == strays(content), (content, border, cut)
                assert content.startswith(out)
                if chunks.fault is None:
                    assert (out, chunks.size) == (content, length)
                raw, out = carry(content, border, cuts=(cut,), binary=True)
                assert (raw.fault, out, raw.size, raw.received) == (None, content, length, length)


@given(st.lists(st.sampled_from([b"\r\n", b".", b"a", b"\r", b"\n"])), st.lists(st.integers(0, 40)))
def test_any_number_of_borders(pieces: list[bytes], borders: list[int]) -> None:
    content = b"".join(pieces)
    chunks, out = carry(content, *(border for border in borders if border <= len(content)))
    assert (chunks.fault is Fault.STRAY_NEWLINE) == strays(content)
    assert strays(content) or out == content


def test_a_cr_that_nothing_follows_is_bare_only_once_that_is_known() -> None:
    chunks = Chunks(max_size=0, binary=False)
    chunks.begin(2, last=False)
    assert chunks.feed(b"a\r") == b"a\r"
    assert chunks.fault is None
    chunks.begin(0, last=True)
    assert chunks.fault is Fault.STRAY_NEWLINE


def test_nul_is_named() -> None:
    assert carry(b"a\0")[0].fault is Fault.NUL


@pytest.mark.parametrize("cut", range(30))
@pytest.mark.parametrize("border", range(30))
def test_the_header_section_is_kept_wherever_it_is_cut(border: int, cut: int) -> None:
    content = b"A: 1\r\nB: 2\r\n 3\r\n\r\nbody: 4\r\n\r\n"
    chunks, _ = carry(content, border, cuts=(cut,))
    assert (chunks.header, chunks.header_complete) == (b"A: 1\r\nB: 2\r\n 3", True)


def test_the_kept_header_is_bounded_and_complete_at_the_end() -> None:
    chunks, out = carry(b"A: " + b"x" * 200_000 + b"\r\n", 60_000, cuts=(30_000,))
    assert (len(chunks.header), len(out)) == (MAX_HEADER, 200_005)
    assert carry(b"A: 1\r\n")[0].header_complete
    assert carry(b"")[0].header_complete
    assert carry(b"\r\nbody")[0].header == b""


def test_a_size_beyond_the_limit_is_a_fault_as_soon_as_it_is_announced() -> None:
    chunks = Chunks(max_size=10, binary=False)
    chunks.begin(10, last=False)
    assert chunks.feed(b"0123456789") == b"0123456789"
    chunks.begin(1, last=True)
    assert chunks.fault is Fault.TOO_LARGE
    assert chunks.feed(b"x") == b""
    assert chunks.received == 11
    assert not chunks.hopeless


@pytest.mark.parametrize(
    ("max_size", "size", "hopeless"),
    [
        (10, 15 + MAX_RECEIVED_OVERSHOOT, False),
        (10, 16 + MAX_RECEIVED_OVERSHOOT, True),
        (0, MAX_CHUNK, False),
        (0, MAX_CHUNK + 1, True),
        (2**40, 2**32 + 5, True),
    ],
)
def test_what_is_hopeless_is_known_at_once(max_size: int, size: int, hopeless: bool) -> None:
    chunks = Chunks(max_size=max_size, binary=True)
    chunks.begin(size, last=False)
    assert chunks.hopeless is hopeless
