"""How much of the public Internet a list of networks covers: the guard against an open relay.

Rules: pure arithmetic on whole numbers. Addresses that cannot arrive from the Internet (loopback, private,
shared, link-local, unique local) do not count; an address named twice counts once; IPv4-mapped IPv6 counts
as IPv4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network

__all__ = ["Network", "parse_network", "public_addresses", "too_wide"]

Network = IPv4Network | IPv6Network

_Range = tuple[int, int]  # first and last address, both inside

_LARGEST_IPV4 = 1 << (32 - 8)
_LARGEST_IPV6 = 1 << (128 - 16)
_MAPPED = IPv6Network("::ffff:0:0/96")

_NOT_PUBLIC_IPV4 = (
    "10.0.0.0/8",  # RFC 1918
    "100.64.0.0/10",  # RFC 6598, between a carrier and its customers
    "127.0.0.0/8",
    "169.254.0.0/16",  # RFC 3927
    "172.16.0.0/12",
    "192.168.0.0/16",
)
_NOT_PUBLIC_IPV6 = (
    "::1/128",
    "fc00::/7",  # RFC 4193
    "fe80::/10",
    str(_MAPPED),  # counted as IPv4
)


def parse_network(text: str) -> Network:
    """Return the network or the single address that `text` writes; raise ValueError with the reason if none.

    An IPv4-mapped network becomes the IPv4 network that it maps, which is how such a client is looked at.
    """
    kind = IPv6Network if ":" in text else IPv4Network
    try:
        network = kind(text)
    except ValueError:
        try:
            loose = kind(text, strict=False)
        except ValueError:
            raise ValueError(f'"{text[:60]}" is no network such as 192.0.2.0/24 or 2001:db8::/32') from None
        raise ValueError(f'"{text}" has bits set behind its prefix: write "{loose}"') from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def too_wide(networks: Sequence[Network]) -> str | None:
    """Return why relaying for `networks` would make an open relay, or None if it would not.

    The limits are the public space of a /8 in IPv4 and of a /16 in IPv6, all networks added up.
    """
    reasons = []
    for version, largest, prefix in ((4, _LARGEST_IPV4, 8), (6, _LARGEST_IPV6, 16)):
        culprits = [network for network in networks if public_addresses(version, [network])]
        if public_addresses(version, culprits) > largest:
            reasons.append(f"{_listed(culprits)} cover more public IPv{version} space than a /{prefix}")
    return "; ".join(reasons) or None


def public_addresses(version: int, networks: Iterable[Network]) -> int:
    """Count the public addresses of IP `version` in `networks`."""
    ranges = [found for network in networks if (found := _range(version, network))]
    exempt = _EXEMPT[version]
    merged = _merge(ranges)
    covered = sum(last - first + 1 for first, last in merged)
    shared = sum(
        min(last, exempt_last) - max(first, exempt_first) + 1
        for first, last in merged
        for exempt_first, exempt_last in exempt
        if first <= exempt_last and exempt_first <= last
    )
    return covered - shared


def _range(version: int, network: Network) -> _Range | None:
    """The addresses of IP `version` in `network`: an IPv6 network may hold mapped IPv4 addresses too."""
    first, last = int(network.network_address), int(network.broadcast_address)
    if network.version == version:
        return first, last
    if version == 6:
        return None
    mapped_first, mapped_last = int(_MAPPED.network_address), int(_MAPPED.broadcast_address)
    first, last = max(first, mapped_first), min(last, mapped_last)
    return (first - mapped_first, last - mapped_first) if first <= last else None


def _merge(ranges: Iterable[_Range]) -> list[_Range]:
    merged: list[_Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _listed(networks: Sequence[Network]) -> str:
    shown = ", ".join(str(network) for network in networks[:5])
    return f"{shown} and {len(networks) - 5} more" if len(networks) > 5 else shown


_EXEMPT = {
    4: _merge((int(n.network_address), int(n.broadcast_address)) for n in map(IPv4Network, _NOT_PUBLIC_IPV4)),
    6: _merge((int(n.network_address), int(n.broadcast_address)) for n in map(IPv6Network, _NOT_PUBLIC_IPV6)),
}
