from __future__ import annotations

import sys
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from relay.selftest.machine import MAX_OWN, own_addresses, sources, targets
from relay.selftest.wire import Place
from relay.settings.networks import parse_network

if TYPE_CHECKING:
    from pathlib import Path

OWN = ["192.0.2.7", "10.0.0.7", "2001:db8::7"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux only")


@pytest.mark.parametrize(
    ("host", "met"),
    [
        ("0.0.0.0", ["127.0.0.1", "192.0.2.7", "10.0.0.7"]),
        ("::", ["::1", "2001:db8::7"]),
        ("127.0.0.3", ["127.0.0.3"]),
        ("::1", ["::1"]),
    ],
)
def test_targets(host: str, met: list[str]) -> None:
    assert targets(host, OWN) == met


@LINUX
@pytest.mark.parametrize(
    ("allow", "strangers", "allowed"),
    [
        (["127.0.0.0/8"], ["192.0.2.7", "10.0.0.7"], ["127.0.0.1"]),
        (["127.0.0.1/32", "10.0.0.0/8"], ["127.0.0.2", "192.0.2.7"], ["127.0.0.1", "10.0.0.7"]),
        ([], ["127.0.0.1", "192.0.2.7", "10.0.0.7"], []),
        (["127.0.0.0/8", "192.0.2.7", "10.0.0.7"], [], ["127.0.0.1", "192.0.2.7", "10.0.0.7"]),
    ],
)
def test_strangers_are_whom_the_list_does_not_name(
    allow: list[str], strangers: list[str], allowed: list[str]
) -> None:
    found = sources("127.0.0.1", OWN, [parse_network(text) for text in allow])

    assert (list(found.strangers), list(found.allowed)) == (strangers, allowed)


def test_a_source_is_of_the_same_ip_version() -> None:
    assert all(":" in source for kind in sources("::1", OWN, []) for source in kind)


def test_own_addresses_can_be_bound_and_are_no_loopback(tmp_path: Path) -> None:
    (tmp_path / "fib_trie").write_text("   |-- 203.0.113.9\n      /32 host LOCAL\n")
    for proc in (tmp_path, tmp_path / "none"):
        found = [ip_address(address) for address in own_addresses(proc)]
        assert ip_address("203.0.113.9") not in found  # nobody's (RFC 5737), so it cannot be bound
        assert not any(address.is_loopback or address.is_link_local for address in found)
        assert len(found) <= 2 * MAX_OWN


def test_places_as_they_are_written() -> None:
    assert [str(Place("127.0.0.1", 25)), str(Place("::1", 25)), str(Place("", 0, "/run/x"))] == [
        "127.0.0.1:25",
        "[::1]:25",
        "unix:/run/x",
    ]
