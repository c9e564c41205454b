"""May this pass? Pure functions of values."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LOCAL", "Address", "client_address", "may_relay", "may_send", "trusted_proxy"]

Address = IPv4Address | IPv6Address

LOCAL: Final = IPv4Address("127.0.0.1")
"""What a peer on a unix socket counts as: it has no address, and is on this machine."""

# Local part (RFC 5321 4.1.2): a quoted string, or octets of which none means anything to a parser; then the
# one "@", and a domain or an address literal.
_MAILBOX: Final = re.compile(
    rb'(?:"((?:[^\x00-\x1f\x7f"\\]|\\[\x20-\x7e])*)"|([^\x00-\x20\x7f"()<>\[\]:;@\\,]+))'
    rb'@([^\x00-\x20\x7f"()<>:;@\\,\[\]]+|\[[^\x00-\x20\x7f"()<>@\\,\[\]]+\])'
)
_QUOTED_PAIR: Final = re.compile(rb"\\(.)")


def client_address(peer: str) -> Address | None:
    """Return a peer's address, an IPv4 one that came mapped into IPv6 as IPv4; None if it is none."""
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def may_relay(client: Address | None, allow: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Whether a client without AUTH may relay: its address is known, and lies in an allowed network."""
    return client is not None and any(client in network for network in allow)


def trusted_proxy(peer: Address, trusted: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Whether a peer's PROXY header is to be believed: its address lies in a network of trusted proxies."""
    return any(peer in network for network in trusted)


def may_send(senders: tuple[str, ...] | None, reverse_path: bytes) -> bool:
    """Whether a user whose `senders` these are may use `reverse_path` (what stands between the brackets).

    Each is a pattern `LOCAL@DOMAIN`, both sides with the wildcards of `fnmatch`, or `<>`, the null
    reverse-path; None allows any. Both sides must match, without regard to the case of ASCII letters, and a
    local part matches without its quotes. What two readers could take for two senders is never allowed:
    a source route, a second "@" outside quotes, a path without a domain, octets that are no UTF-8.
    """
    if senders is None:
        return True
    if not reverse_path:
        return "<>" in senders
    mailbox = _MAILBOX.fullmatch(reverse_path)
    if mailbox is None:
        return False
    quoted, plain, domain = mailbox.groups()
    local = _QUOTED_PAIR.sub(rb"\1", quoted) if plain is None else plain
    try:
        # As octets: as text the Kelvin sign, too, would become a k.
        given_local, given_domain = local.lower().decode(), domain.lower().decode()
    except UnicodeDecodeError:
        return False
    for pattern in senders:
        allowed_local, _, allowed_domain = pattern.encode().lower().decode().rpartition("@")
        if fnmatchcase(given_local, allowed_local) and fnmatchcase(given_domain, allowed_domain):
            return True
    return False
