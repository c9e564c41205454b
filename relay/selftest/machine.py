"""Who this machine can be: the addresses at which a listener is met here, and those a client can come from.

A stranger from the network cannot be played without a second machine, but the relay knows a client by its
address alone: a connection from an address of this machine that is not in `clients.allow` meets the same
rule as one from anywhere else.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relay.policy import Address, may_relay

if TYPE_CHECKING:
    from relay.settings import Network

__all__ = ["Sources", "own_addresses", "sources", "targets"]

MAX_OWN = 4
"""Addresses of this machine, of each IP version, that are used; one with many containers has hundreds."""

_LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.1.2.3", "127.254.254.254", "::1")
"""On Linux all of 127.0.0.0/8 is this machine; elsewhere only the first can be used."""
_PROC = Path("/proc/net")


class Sources(NamedTuple):
    """The addresses from which this machine can reach a target, by what the relay makes of them."""

    strangers: Sequence[str]
    allowed: Sequence[str]


def own_addresses(proc: Path = _PROC) -> list[str]:
    """Return this machine's addresses other than loopback and link-local ones, public ones first."""
    found = {*_routed(), *_listed(proc)}
    usable = [
        address
        for address in {ip_address(text) for text in found}
        if not (address.is_loopback or address.is_link_local or address.is_multicast)
        and _can_be_used(str(address))
    ]
    usable.sort(key=lambda address: (not address.is_global, int(address)))
    return [str(address) for version in (4, 6) for address in _few(usable, version)]


def targets(host: str, own: Iterable[str]) -> list[str]:
    """Return the IP addresses at which a listener at `host` (name or address) can be met from here."""
    if host == "0.0.0.0":  # noqa: S104  compared, not bound
        return ["127.0.0.1", *(address for address in own if ":" not in address)]
    if host == "::":
        return ["::1", *(address for address in own if ":" in address)]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def sources(target: str, own: Iterable[str], allow: Sequence[Network]) -> Sources:
    """Return the addresses from which `target` can be reached: one loopback stranger, and all own ones."""
    strangers: list[str] = []
    allowed: list[str] = []
    for source in (*_LOOPBACK, *own):
        loopback = source in _LOOPBACK
        if (":" in source) != (":" in target) or (loopback and not _can_be_used(source)):
            continue
        if may_relay(ip_address(source), allow):
            allowed.append(source)
        elif not (loopback and strangers):
            strangers.append(source)
    return Sources(strangers, [source for source in allowed if source not in _LOOPBACK[1:4]])


def _few(addresses: Iterable[Address], version: int) -> list[Address]:
    return [address for address in addresses if address.version == version][:MAX_OWN]


def _routed() -> set[str]:
    """The addresses from which packets would leave; connecting a datagram socket sends none."""
    found = set()
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            found.add(str(probe.getsockname()[0]).partition("%")[0])
    return found


def _listed(proc: Path) -> set[str]:
    """The addresses of all interfaces, where the system is Linux."""
    found = set()
    with contextlib.suppress(OSError):
        found |= set(re.findall(r"\|-- (\S+)\n +/32 host LOCAL", (proc / "fib_trie").read_text()))
    with contextlib.suppress(OSError):
        for line in (proc / "if_inet6").read_text().splitlines():
            digits = line.partition(" ")[0]
            found.add(":".join(digits[at : at + 4] for at in range(0, 32, 4)))
    return found


def _can_be_used(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
