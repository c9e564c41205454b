"""What the configuration says about who may relay, before anything is tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.selftest.finding import Finding
from relay.settings.networks import public_addresses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.settings import Settings

__all__ = ["facts"]

_WHERE = "configuration"


def facts(settings: Settings) -> Iterator[Finding]:
    """Say who may relay, by address and by AUTH, and where mail can be read on its way."""
    clients = settings.clients
    listed = ", ".join(str(network) for network in clients.allow) or "nobody"
    public = {version: public_addresses(version, clients.allow) for version in (4, 6)}
    counted = [f"{count} public IPv{version} addresses" for version, count in public.items() if count]
    if counted:
        who = f"{' and '.join(counted)} may relay without AUTH: clients.allow is {listed}"
        yield Finding(_WHERE, "note", who)
    else:
        yield Finding(_WHERE, "ok", f"no public address may relay without AUTH: clients.allow is {listed}")
    if clients.auth != "none":
        yield Finding(_WHERE, "ok", f"others may relay with AUTH: {clients.auth}")
    for listener in settings.listeners:
        if listener.tls == "none" and not listener.loopback:
            text = f"listener {listener.address} has no TLS: who is in between can read the mail"
            yield Finding(_WHERE, "note", text)
