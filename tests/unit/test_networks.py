from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import pytest

from relay.settings.networks import parse_network, too_wide


def wide(*texts: str) -> str | None:
    return too_wide([parse_network(text) for text in texts])


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.0/24", IPv4Network("192.0.2.0/24")),
        ("192.0.2.1", IPv4Network("192.0.2.1/32")),
        ("192.0.2.0/255.255.255.0", IPv4Network("192.0.2.0/24")),
        ("2001:db8::/32", IPv6Network("2001:db8::/32")),
        ("::1", IPv6Network("::1/128")),
        ("::ffff:192.0.2.0/120", IPv4Network("192.0.2.0/24")),
        ("::ffff:192.0.2.1", IPv4Network("192.0.2.1/32")),
        ("::ffff:0:0/96", IPv4Network("0.0.0.0/0")),
        ("::ffff:0:0/95", None),
        ("::fffe:0:0/95", IPv6Network("::fffe:0:0/95")),
    ],
)
def test_networks(text: str, network: object) -> None:
    if network is None:
        with pytest.raises(ValueError, match="bits set behind its prefix"):
            parse_network(text)
    else:
        assert parse_network(text) == network


@pytest.mark.parametrize(
    "text", ["", "everyone", "192.0.2", "192.0.2.0/33", "1.2.3.4/-1", "::/129", ":::", "10"]
)
def test_no_networks(text: str) -> None:
    with pytest.raises(ValueError, match="is no network such as"):
        parse_network(text)


@pytest.mark.parametrize(
    "networks",
    [
        [],
        ["127.0.0.0/8", "::1/128"],
        ["8.0.0.0/8"],
        ["8.0.0.0/9", "8.128.0.0/9"],
        ["8.0.0.0/9", "24.0.0.0/9"],
        ["8.0.0.0/8", "8.0.0.0/8", "8.8.8.8"],  # an address named twice counts once
        ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"],
        ["10.0.0.0/8", "8.0.0.0/8", "127.0.0.0/8"],
        ["2600::/16"],
        ["2600::/17", "2800::/17"],
        ["2600::/16", "fc00::/7", "fe80::/10", "::1"],
        ["8.0.0.0/8", "2600::/16"],  # each family has its own limit
        ["::ffff:8.0.0.0/104"],
    ],
    ids=str,
)
def test_narrow_enough(networks: list[str]) -> None:
    assert wide(*networks) is None


@pytest.mark.parametrize(
    "networks",
    [
        ["0.0.0.0/0"],
        ["0.0.0.0/1"],
        ["128.0.0.0/1"],
        ["8.0.0.0/7"],
        ["8.0.0.0/8", "9.0.0.0"],
        ["8.0.0.0/9", "8.128.0.0/9", "9.0.0.0"],
        ["8.0.0.0/9", "24.0.0.0/9", "9.9.9.9"],
        ["8.0.0.0/8", "::ffff:9.9.9.9"],
        ["::ffff:0:0/96"],
        ["::fffe:0:0/95"],  # holds all mapped addresses, though it is tiny among IPv6 networks
        ["8.0.0.0/6", "10.0.0.0/8"],  # 8, 9 and 11 are public
    ],
    ids=str,
)
def test_too_wide_in_ipv4(networks: list[str]) -> None:
    reason = wide(*networks)

    assert reason is not None
    assert reason.endswith("cover more public IPv4 space than a /8")


@pytest.mark.parametrize(
    "networks",
    [
        ["2000::/3"],
        ["2600::/15"],
        ["2600::/16", "2601::"],
        ["2600::/17", "2600:8000::/17", "2a00::1"],
        ["fc00::/6"],  # the upper half of it is neither unique local nor link-local alone
    ],
    ids=str,
)
def test_too_wide_in_ipv6(networks: list[str]) -> None:
    reason = wide(*networks)

    assert reason is not None
    assert reason.endswith("cover more public IPv6 space than a /16")


def test_everything_is_too_wide_twice() -> None:
    assert wide("::/0") == (
        "::/0 cover more public IPv4 space than a /8; ::/0 cover more public IPv6 space than a /16"
    )


def test_only_the_public_networks_are_named() -> None:
    assert wide("10.0.0.0/8", "8.0.0.0/8", "9.9.9.9", "::1") == (
        "8.0.0.0/8, 9.9.9.9/32 cover more public IPv4 space than a /8"
    )


def test_a_long_list_is_cut() -> None:
    reason = wide(*(f"{first}.0.0.0/10" for first in range(11, 20)))

    assert reason is not None
    assert "15.0.0.0/10 and 4 more cover" in reason
    assert "16.0.0.0" not in reason
