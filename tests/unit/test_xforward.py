"""What XFORWARD tells, octet by octet: nothing that a client says in EHLO can become anything else."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.upstream.xforward import Client, command

TASK_ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
ALL = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")
CLIENT = Client("192.0.2.1", 40000, b"client.test", esmtp=True)


def said(client: Client, name: str) -> bytes:
    """The encoded value of one attribute."""
    line = command((name,), client, TASK_ID)
    assert line is not None
    start = b"XFORWARD %b=" % name.encode()
    assert line.startswith(start)
    assert line.endswith(b"\r\n")
    return line[len(start) : -2]


def helo(octets: bytes) -> bytes:
    return said(Client("192.0.2.1", 1, octets, esmtp=True), "HELO")


def test_everything_in_one_command() -> None:
    assert command(ALL, CLIENT, TASK_ID) == (
        b"XFORWARD IDENT=01890a5d-ac96-774b-bcce-b302099a8057 PROTO=ESMTP HELO=client.test SOURCE=REMOTE"
        b" NAME=[UNAVAILABLE] PORT=40000 ADDR=192.0.2.1\r\n"
    )


def test_only_what_the_upstream_offers() -> None:
    assert command(("HELO", "ADDR", "FUTURE"), CLIENT, TASK_ID) == (
        b"XFORWARD HELO=client.test ADDR=192.0.2.1\r\n"
    )
    assert command(("FUTURE",), CLIENT, TASK_ID) is None
    assert command((), CLIENT, TASK_ID) is None


@pytest.mark.parametrize(
    ("address", "told", "source"),
    [
        ("192.0.2.1", b"192.0.2.1", b"REMOTE"),
        ("10.0.0.1", b"10.0.0.1", b"REMOTE"),
        ("2001:db8::1", b"IPV6:2001:db8::1", b"REMOTE"),
        ("127.0.0.5", b"127.0.0.5", b"LOCAL"),
        ("::1", b"IPV6:::1", b"LOCAL"),
        ("::ffff:192.0.2.1", b"192.0.2.1", b"REMOTE"),
        ("unix", b"[UNAVAILABLE]", b"LOCAL"),
        ("unknown", b"[UNAVAILABLE]", b"REMOTE"),
    ],
)
def test_addresses(address: str, told: bytes, source: bytes) -> None:
    client = Client(address, None, b"client.test", esmtp=True)
    assert (said(client, "ADDR"), said(client, "SOURCE")) == (told, source)
    assert said(client, "PORT") == b"[UNAVAILABLE]"


def test_protocols() -> None:
    assert said(CLIENT, "PROTO") == b"ESMTP"
    assert said(Client("192.0.2.1", 1, b"client.test", esmtp=False), "PROTO") == b"SMTP"


@pytest.mark.parametrize(
    ("octets", "told"),
    [
        (b"client.test", b"client.test"),
        (b" client.test ", b"client.test"),
        (b"[192.0.2.1]", b"[192.0.2.1]"),
        (b"[IPv6:2001:db8::1]", b"[IPv6:2001:db8::1]"),
        (b"a+b=c", b"a+2Bb+3Dc"),
        (b"x+0D+0AMAIL", b"x+2B0D+2B0AMAIL"),
        (b"x ADDR=127.0.0.1", b"x?ADDR+3D127.0.0.1"),
        (b"x\r\nMAIL FROM:<a@example.test>", b"x??MAIL?FROM:?a?example.test?"),
        (b"x\nRSET", b"x?RSET"),
        (b"x\rRSET", b"x?RSET"),
        (b"x\0\x1b[2J\x7f", b"x??[2J?"),
        (b"x\ty", b"x?y"),
        ("büro.test".encode(), b"b??ro.test"),
        (b'a(b)"c\\;d', b"a?b??c??d"),
        (b"", b"[UNAVAILABLE]"),
        (b"x" * 255, b"x" * 255),
        (b"x" * 256, b"[UNAVAILABLE]"),
        (b"=" * 85, b"+3D" * 85),
        (b"=" * 86, b"[UNAVAILABLE]"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_the_client_calls_itself(octets: bytes, told: bytes) -> None:
    assert helo(octets) == told


@given(st.binary(max_size=600))
def test_whatever_the_client_calls_itself_is_one_harmless_value(octets: bytes) -> None:
    value = helo(octets)
    assert re.fullmatch(rb"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+", value)  # xtext, RFC 3461 section 4
    assert len(value) <= 255
    decoded = re.sub(rb"\+([0-9A-F]{2})", lambda found: bytes.fromhex(found[1].decode()), value)
    assert not re.search(rb'[^!-~]|[<>()\\";@]', decoded)


def test_the_longest_command_is_within_what_a_command_may_have() -> None:
    longest = Client("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535, b"x" * 255, esmtp=True)
    line = command(ALL, longest, TASK_ID)
    assert line is not None
    assert 400 < len(line) <= 512
