"""Who may relay."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from relay.policy import client_address, may_relay

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


def test_a_peer_without_an_address_came_by_a_socket_that_its_file_mode_guards() -> None:
    assert client_address("unix") is None
    assert may_relay(None, LOOPBACK)
