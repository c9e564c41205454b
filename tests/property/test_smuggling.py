"""Smuggling, exhaustively: no content makes any receiver see an end of data that the relay did not see.

All strings over CR, LF, dot, a letter and NUL to length 7, 97,655 contents; each with its end of data behind
it, whole and in every two-way split, with stray newlines mended and refused: 2,294,910 messages. What then
went upstream is read by eleven models of lenient receivers. A message that was refused in its middle counts
too: the part that was written before must not hold an end of data either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast

import pytest

from relay.body import Body, Fault
from tests.support.content import stuff, unstuff
from tests.support.receivers import RECEIVERS, strict

LETTERS = b"\r\n.a\0"
LENGTH = 7
CONTENTS = sum(len(LETTERS) ** length for length in range(1, LENGTH + 1))
END = b"\r\n.\r\n"
TERMINATOR = b".\r\n"
"""What the relay writes behind the content once the message may go out (`Transaction.finish`)."""

STRAY = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
BARE_LF = re.compile(rb"(?<!\r)\n")
STUFFED_AFTER_LF = re.compile(rb"(?<!\r)\n\.(?=\.)")
BARE_CR = re.compile(rb"\r(?!\n)")


def contents(length: int = LENGTH) -> Iterator[bytes]:
    """Yield all strings, the empty one apart: it has nothing to split."""
    for size in range(1, length + 1):
        for letters in itertools.product(LETTERS, repeat=size):
            yield bytes(letters)


@cache
def betrayed(written: bytes, *, whole: bool) -> tuple[str, ...]:
    """Return the receivers that stop anywhere but at the very end of a whole message, or in a part of one."""
    expected = len(written) if whole else None
    return tuple(receiver.__name__ for receiver in RECEIVERS if receiver(written) != expected)


def carried(blocks: tuple[bytes, ...], *, normalize: bool) -> tuple[Body, bytes]:
    """Carry `blocks` as a transaction does; return the body and all that was written upstream."""
    body = Body(max_size=0, normalize=normalize)
    written = b""
    for block in blocks:
        if body.ended:
            body.rest += block
        else:
            written += body.feed(block)
    return body, written


def mended(own: bytes) -> bytes:
    """Return what a message with stray newlines is to stand for at the receiver, transparency undone."""
    return BARE_LF.sub(b"\r\n", STUFFED_AFTER_LF.sub(b"\n", BARE_CR.sub(b" ", unstuff(own))))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "refuse"])
def test_no_receiver_sees_an_end_of_data_that_the_relay_did_not(*, normalize: bool) -> None:
    written_upstream: set[tuple[bytes, bool]] = set()
    count = 0
    for content in contents():
        count += 1
        wire = content + END
        end = cast("int", strict(wire))
        own, rest = wire[: end - len(TERMINATOR)], wire[end:]
        whole, expected = carried((wire,), normalize=normalize)
        assert whole.ended
        assert whole.rest == rest, wire
        if not STRAY.search(own):
            assert (whole.fault, expected) == (None, own), wire
        elif normalize and b"\0" not in own:
            assert whole.fault is None, wire
            assert unstuff(expected) == mended(own), wire
            assert not STRAY.search(expected), wire
        else:
            assert whole.fault in (Fault.NUL, Fault.STRAY_NEWLINE), wire
        if whole.fault is None:
            assert whole.size == len(unstuff(expected)), wire
            written_upstream.add((expected + TERMINATOR, True))
        for cut in range(1, len(wire)):
            body, written = carried((wire[:cut], wire[cut:]), normalize=normalize)
            assert body.ended
            assert body.rest == rest, (wire, cut)
            assert (body.fault is None) == (whole.fault is None), (wire, cut)
            if body.fault is not None:  # what went up before the fault was found is cut off there
                written_upstream.add((written, False))
            elif written != expected or body.size != whole.size:
                raise AssertionError(wire, cut)
    assert count == CONTENTS == 97_655
    for octets, is_whole in written_upstream:
        assert not betrayed(octets, whole=is_whole), octets


# The test of the test: whom the models betray where nothing, or too little, is done about stray octets.


def as_it_is(own: bytes) -> bytes:
    """Pass everything on, as a relay does that knows the end of data and nothing more."""
    return own


def newlines_mended_alone(own: bytes) -> bytes:
    """Mend CR and LF, and let NUL pass."""
    return stuff(mended(own)) if BARE_CR.search(own) or BARE_LF.search(own) else own


def mended_without_stuffing(own: bytes) -> bytes:
    """Mend CR and LF, refuse NUL, and forget that the new lines need their dots."""
    return b"" if b"\0" in own else BARE_LF.sub(b"\r\n", BARE_CR.sub(b" ", own))


@pytest.mark.parametrize(
    ("relay", "victims"),
    [
        (as_it_is, {receiver.__name__ for receiver in RECEIVERS}),
        (newlines_mended_alone, {"without_nul", "c_string"}),
        (mended_without_stuffing, {receiver.__name__ for receiver in RECEIVERS}),
    ],
    ids=["as_it_is", "newlines_mended_alone", "mended_without_stuffing"],
)
def test_a_relay_that_does_less_betrays(relay: Callable[[bytes], bytes], victims: set[str]) -> None:
    found: set[str] = set()
    for content in contents(5):
        wire = content + END
        own = wire[: cast("int", strict(wire)) - len(TERMINATOR)]
        found.update(betrayed(relay(own) + TERMINATOR, whole=True))
    assert found == victims


def test_every_model_is_lenient_in_a_way_of_its_own() -> None:
    """No model could be left out: any two differ on some content, and all agree on clean ones."""
    views: dict[str, list[int | None]] = {receiver.__name__: [] for receiver in RECEIVERS}
    for content in contents(6):
        for receiver in RECEIVERS:
            views[receiver.__name__].append(receiver(content + END))
            assert STRAY.search(content) or views[receiver.__name__][-1] == strict(content + END)
    assert len({tuple(view) for view in views.values()}) == len(RECEIVERS) == 11
