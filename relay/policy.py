"""May this pass? Pure functions of values."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Address", "client_address", "may_relay"]

Address = IPv4Address | IPv6Address


def client_address(peer: str) -> Address | None:
    """Return a peer's address, an IPv4 one that came mapped into IPv6 as IPv4; None for a unix socket."""
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def may_relay(client: Address | None, allow: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Whether a client without AUTH may relay: its address lies in an allowed network.

    A client on a unix socket has no address; who may open the socket is for its file mode to say.
    """
    return client is None or any(client in network for network in allow)
