from __future__ import annotations

import re

import pytest

from relay.settings.address import ADDRESS_PATTERN, Address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("smtp.example.com:587", "smtp.example.com", 587),
        ("smtp.example.com.:587", "smtp.example.com.", 587),
        ("mail_relay:25", "mail_relay", 25),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:2525", "::1", 2525),
        ("[2001:DB8:0::1]:65535", "2001:db8::1", 65535),
        ("[fe80::1%eth0]:25", "fe80::1%eth0", 25),
        ("3com.example:25", "3com.example", 25),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = Address.parse(text)

    assert (address.host, address.port) == (host, port)
    assert Address.parse(str(address)) == address
    assert re.fullmatch(ADDRESS_PATTERN, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no port"),
        ("smtp.example.com", "has no port"),
        ("smtp.example.com:", "has no port"),
        ("[::1]", "has no port"),
        ("[::1]2525", "has no port"),
        ("[::1:2525", "no closing bracket"),
        ("::1:2525", "stands in brackets"),
        ("::1", "stands in brackets"),
        (":2525", "names no host"),
        ("[]:2525", "names no host"),
        ("[127.0.0.1]:25", "no IPv6 address"),
        ("[smtp.example.com]:25", "no IPv6 address"),
        ("localhost:smtp", "the port must be"),
        ("localhost:65536", "the port must be"),
        ("localhost:-1", "the port must be"),
        ("localhost:٢٥", "the port must be"),
        ("smtp://example.com:25", "is a URL"),
        ("unix:/run/relay.sock", "a unix socket cannot stand here"),
        ("a b:25", "no host name"),
        ("a..b:25", "no host name"),
        ("-a:25", "no host name"),
        ("a\r\n:25", "no host name"),
        ("ä.example:25", "no host name"),
        ("user@host:25", "no host name"),
        (f"{'a' * 64}:25", "no host name"),
        (f"{'a.' * 127}a:25", "no host name"),
        ("127.1:25", "no IPv4 address"),
        ("256.0.0.1:25", "no IPv4 address"),
        ("2130706433:25", "no IPv4 address"),
        ("0x7f000001:25", "no IPv4 address"),
    ],
)
def test_no_addresses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Address.parse(text)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "LocalHost.:1", "a.localhost:1"]
)
def test_loopback(text: str) -> None:
    assert Address.parse(text).loopback


@pytest.mark.parametrize(
    "text", ["10.0.0.1:1", "0.0.0.0:1", "[::]:1", "localhost.example.com:1", "notlocalhost:1"]
)
def test_not_loopback(text: str) -> None:
    assert not Address.parse(text).loopback


@pytest.mark.parametrize(
    ("one", "other", "collide"),
    [
        ("127.0.0.1:25", "127.0.0.1:25", True),
        ("127.0.0.1:25", "127.0.0.1:26", False),
        ("127.0.0.1:25", "127.0.0.2:25", False),
        ("0.0.0.0:25", "127.0.0.1:25", True),
        ("[::]:25", "[::1]:25", True),
        ("[::]:25", "0.0.0.0:25", False),
        ("[::]:25", "127.0.0.1:25", False),
        ("localhost:25", "127.0.0.1:25", True),
        ("LOCALHOST:25", "[::1]:25", True),
        ("localhost:25", "0.0.0.0:25", True),
        ("a.example:25", "A.EXAMPLE:25", True),
        ("a.example:25", "b.example:25", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
    ],
)
def test_collisions(one: str, other: str, collide: bool) -> None:
    assert Address.parse(one).collides(Address.parse(other)) is collide
    assert Address.parse(other).collides(Address.parse(one)) is collide
