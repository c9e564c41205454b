"""Who may relay, and as whom."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_network

import pytest

from relay.policy import LOCAL, client_address, may_relay, may_send, trusted_proxy

LOOPBACK = [ip_network("127.0.0.0/8"), ip_network("::1/128")]


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("128.0.0.1", False),
        ("192.0.2.1", False),
        ("::2", False),
        ("fe80::1%eth0", False),
        ("::ffff:192.0.2.1", False),
    ],
)
def test_by_default_only_loopback_may_relay(peer: str, allowed: bool) -> None:
    assert may_relay(client_address(peer), LOOPBACK) is allowed


def test_a_peer_on_a_unix_socket_counts_as_this_machine() -> None:
    assert client_address("unix") is None
    assert may_relay(LOCAL, LOOPBACK)
    assert trusted_proxy(LOCAL, LOOPBACK)


def test_a_client_that_nobody_knows_may_not_relay() -> None:
    assert not may_relay(None, LOOPBACK)
    assert not may_relay(None, [IPv4Network("0.0.0.0/0")])


def test_a_proxy_is_trusted_by_its_network() -> None:
    trusted = [IPv4Network("10.0.0.8/30")]
    assert trusted_proxy(IPv4Address("10.0.0.9"), trusted)
    assert not trusted_proxy(IPv4Address("10.0.0.12"), trusted)
    assert not trusted_proxy(LOCAL, [])


TEAM = ("*@example.com", "noreply@Example.ORG", "app-?@*.example.net", "<>")


@pytest.mark.parametrize(
    "reverse_path",
    [
        b"",
        b"a@example.com",
        b"A.B+tag@EXAMPLE.com",
        b'"a b"@example.com',
        b'"a@evil.example"@example.com',
        b"noreply@example.org",
        b"NoReply@example.org",
        b'"noreply"@example.org',
        b'"no\\reply"@example.org',
        b"app-1@eu.example.net",
        "jürgen@example.com".encode(),
    ],
)
def test_senders_that_match(reverse_path: bytes) -> None:
    assert may_send(TEAM, reverse_path)
    assert may_send(None, reverse_path)


@pytest.mark.parametrize(
    "reverse_path",
    [
        b"a@example.org",
        b"app-12@eu.example.net",
        b"app-1@example.net",
        b"noreply",
        b"@example.com",
        b"a@",
        b"<>",
        b'"a@example.com"',
        b'"@example.com"@evil.example',
        b'"a"@evil.example"@example.com"',
        b'a@evil.example"@example.com"',
        b'"a"b@example.com',
        b"a@evil.example@example.com",
        b"a@example.com@evil.example",
        b"@example.com:ceo@evil.example",
        b"@evil.example:ceo@example.com",
        b"@evil.example,@example.com:a@example.com",
        b"a@evil.example,b@example.com",
        b"a@evil.example (b@example.com",
        b"a@example.com.",
        b"a@example.com.evil.example",
        b"a@evilexample.com",
        b"a\\@evil.example@example.com",
        "a@\N{FULLWIDTH COMMERCIAL AT}example.com".encode(),
        "noreply@example.or\N{LATIN SMALL LETTER SCRIPT G}".encode(),
        b"\xff@example.com",
        b"a@[192.0.2.1]",
    ],
)
def test_senders_that_do_not_match(reverse_path: bytes) -> None:
    assert not may_send(TEAM, reverse_path)
    assert may_send(None, reverse_path)


def test_a_letter_that_only_looks_like_another_case_is_none() -> None:
    kelvin = "\N{KELVIN SIGN}"
    assert kelvin.lower() == "k"
    assert may_send(("k@example.com",), b"K@example.com")
    assert not may_send(("k@example.com",), f"{kelvin}@example.com".encode())


def test_a_pattern_for_one_side_does_not_reach_over_the_other() -> None:
    assert may_send(("ceo@*",), b"ceo@anywhere.example")
    assert not may_send(("ceo@*",), b'"ceo@x"@anywhere.example')


def test_without_patterns_nothing_may_be_sent() -> None:
    assert not may_send((), b"a@example.com")
    assert not may_send(("*@*",), b"")
    assert not may_send((), b"")
