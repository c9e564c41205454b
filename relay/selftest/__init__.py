"""Tries what `relay selftest` promises: the running listeners, as a stranger meets them. Sends no mail.

From an address that may relay nothing can be learnt about strangers, and a probe would go on to the
upstream; so the probes come from addresses of this machine that are not in `clients.allow`, and where there
is none, that is said.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relay.policy import may_relay
from relay.selftest.facts import facts
from relay.selftest.finding import Finding
from relay.selftest.machine import own_addresses, sources, targets
from relay.selftest.manners import manners
from relay.selftest.strangers import Caller, Door, believes_a_header, got_through, proxy_header
from relay.selftest.wire import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from relay.settings import ListenerSettings, Network, Settings

__all__ = ["Finding", "selftest"]

_ELSEWHERE = ("203.0.113.77", "198.51.100.77", "192.0.2.77")
"""Addresses that nobody has (RFC 5737), to be claimed by a proxy that is trusted."""


def selftest(settings: Settings) -> Iterator[Finding]:
    """Look at the configuration, then at each listener; one finding after another, as they come."""
    yield from facts(settings)
    own = own_addresses()
    for listener in settings.listeners:
        yield from _listener(settings, listener, own)


def _listener(settings: Settings, listener: ListenerSettings, own: Sequence[str]) -> Iterator[Finding]:
    where = listener.address
    if listener.path:
        yield from _unix(settings, listener)
        return
    if not listener.port:
        yield Finding(where, "failed", "port 0 is another one at each start: name the port to have it tested")
        return
    try:
        found = targets(listener.host, own)
    except socket.gaierror as error:
        yield Finding(where, "failed", f"{listener.host} has no address: {error.strerror}")
        return
    for target in found:
        place = Place(target, listener.port)
        name = where if str(place) == where else f"{where} at {target}"
        try:
            yield from _target(settings, listener, Door(name, place, listener.tls, Caller("", b"", "")), own)
        except OSError as error:
            reason = error.strerror or error
            yield Finding(name, "failed", f"cannot be tested: {reason}; is the relay running?")


def _unix(settings: Settings, listener: ListenerSettings) -> Iterator[Finding]:
    """Who can open a unix socket may relay: there is no stranger to play, only the file's mode to tell."""
    where = listener.address
    door = Door(where, Place("", 0, listener.path), listener.tls, Caller("", b"", "this user"))
    try:
        mode = Path(listener.path).stat().st_mode & 0o777
        yield Finding(where, "note", f"who can open the socket may relay: its mode is {mode:04o}")
        if not listener.proxy_protocol:
            yield from manners(door, clear_auth=settings.clients.auth_without_tls)
    except OSError as error:
        yield Finding(where, "failed", f"cannot be tested: {error.strerror or error}; is the relay running?")


def _target(
    settings: Settings, listener: ListenerSettings, door: Door, own: Sequence[str]
) -> Iterator[Finding]:
    we = _roles(settings, listener, door.place.host, own)
    if listener.proxy_protocol and not we.proxies:
        yield Finding(door.where, "note", "no address of this machine is in clients.trusted_proxies")
    first = we.strangers[0] if we.strangers else _from(we.allowed[0]) if we.allowed else None
    if first is not None:
        # AUTH without TLS is for clients on this machine, and a stranger behind a proxy is not on it.
        local = not first.preface and ip_address(first.source).is_loopback
        clear_auth = settings.clients.auth_without_tls and local
        yield from manners(door._replace(caller=first), clear_auth=clear_auth)
    if we.allowed:
        text = "may relay (clients.allow): what gets through from there says nothing about strangers"
        yield Finding(door.where, "note", f"{', '.join(we.allowed)} {text}")
    friend = _somebody_in(settings.clients.allow)
    for caller in we.strangers:
        for secured in {"none": (False,), "starttls": (False, True)}.get(listener.tls, (True,)):
            yield got_through(door._replace(caller=caller), settings.server.hostname, friend, secured=secured)
    for source in we.forgers[:1]:
        secured = listener.tls in ("required", "implicit")
        yield believes_a_header(door._replace(caller=_from(source)), friend, secured=secured)
    if not we.strangers:
        yield Finding(door.where, "note", _UNPROVEN.format(port=door.place.port))


class _Roles(NamedTuple):
    """Whom this machine can play before a listener."""

    strangers: Sequence[Caller]
    """Clients that may not relay."""
    forgers: Sequence[str]
    """Addresses of ours whose PROXY header nobody may believe."""
    allowed: Sequence[str] = ()
    """Addresses of ours that may relay."""
    proxies: Sequence[str] = ()
    """Addresses of ours whose PROXY header is believed: then a stranger is whoever that names."""


def _roles(settings: Settings, listener: ListenerSettings, target: str, own: Sequence[str]) -> _Roles:
    allow = settings.clients.allow
    if listener.proxy_protocol:
        proxies = sources(target, own, settings.clients.trusted_proxies)
        strangers = _behind_a_proxy(proxies.allowed, allow)
        return _Roles(strangers, proxies.strangers, proxies=proxies.allowed)
    clients = sources(target, own, allow)
    return _Roles([_from(each) for each in clients.strangers], clients.strangers, allowed=clients.allowed)


_UNPROVEN = (
    "NOT PROVEN: no address of this machine can play a stranger. Ask from outside:"
    " nmap -Pn -n -p {port} --script +smtp-open-relay HOST"
)


def _from(source: str) -> Caller:
    return Caller(source, b"", f"from {source}")


def _behind_a_proxy(proxies: Sequence[str], allow: Sequence[Network]) -> list[Caller]:
    """Strangers of whom a trusted proxy, which we are, tells."""
    clients = [client for client in _ELSEWHERE if not may_relay(ip_address(client), allow)]
    return [
        Caller(proxy, proxy_header(client), f"from {client} by the proxy {proxy}")
        for proxy in proxies[:1]
        for client in clients[:1]
    ]


def _somebody_in(allow: Sequence[Network]) -> str:
    """An address that may relay; a loopback one if the list is empty, since that is what others trust."""
    for network in allow:
        return str(network[1] if network.num_addresses > 1 else network[0])
    return "127.0.0.1"
