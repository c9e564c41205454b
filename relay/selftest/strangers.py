"""The open-relay proof: does the listener take a recipient from somebody whom it must not serve?

Rules: a probe ends with the reply to RCPT; then RSET and the next, or the end. A refusal is a permanent one:
a 4yz or a lost connection proves nothing and is said to be undecided.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Self

from relay.selftest.finding import Finding
from relay.selftest.probes import HELLO, SENDER, Probe, probes
from relay.selftest.wire import Place, RefusedError, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.reply import Reply

__all__ = ["Caller", "Door", "believes_a_header", "got_through", "proxy_header"]

SHOWN = 5
"""Probes that are named where many have the same result."""


class Caller(NamedTuple):
    """Who we are: the IP address that we come from, what we say before SMTP begins, a name for people."""

    source: str
    preface: bytes
    name: str


class Door(NamedTuple):
    """One way to a listener."""

    where: str
    place: Place
    mode: str
    """`tls` of the listener."""
    caller: Caller

    def enter(self, hello: str = HELLO, *, secured: bool) -> Wire:
        """Return a connection on which `hello` has been said, under TLS if `secured`; raises OSError."""
        implicit = self.mode == "implicit"
        wire = Wire(self.place, self.caller.source, self.caller.preface, tls=implicit)
        try:
            _expect(wire.reply(), 220)
            if secured and not implicit:
                _expect(wire.say(HELLO), 250)
                _expect(wire.say("STARTTLS"), 220)
                wire.secure()
            _expect(wire.say(hello), 250)
        except BaseException:
            wire.close()
            raise
        return wire


def got_through(door: Door, hostname: str, allowed: str, *, secured: bool) -> Finding:
    """Try all probes as `door.caller`, whom the listener must not serve."""
    through: list[str] = []
    undecided: list[str] = []
    refusals: Counter[str] = Counter()
    tried = probes(hostname, door.place.host, allowed)
    with _Sessions(door, secured=secured) as sessions:
        for probe in tried:
            try:
                reply = sessions.attempt(probe)
            except OSError as error:
                undecided.append(f"{probe}: {error}")
                continue
            if reply.positive:
                through.append(f"{probe}: {reply}")
            elif reply.transient:
                undecided.append(f"{probe}: {reply}")
            else:
                refusals[str(reply)] += 1
    who = f"{door.caller.name}{', over TLS' if secured else ''}"
    if through:
        text = f"OPEN RELAY: {who} got through with {len(through)} of {len(tried)} probes: {_few(through)}"
        return Finding(door.where, "failed", text)
    if undecided:
        text = f"{who}: {len(undecided)} of {len(tried)} probes were not decided: {_few(undecided)}"
        return Finding(door.where, "failed", text)
    usual = refusals.most_common(1)[0][0]
    return Finding(door.where, "ok", f"{who}: {len(tried)} probes, all refused, mostly with: {usual}")


def believes_a_header(door: Door, claimed: str, *, secured: bool) -> Finding:
    """Try to be `claimed`, who may relay, by a PROXY header that nobody asked for."""
    forged = Caller(door.caller.source, proxy_header(claimed), door.caller.name)
    who = f"{door.caller.name}: a PROXY header that claims {claimed}"
    try:
        with door._replace(caller=forged).enter(secured=secured) as wire:
            reply = _try(wire, Probe("", f"<{SENDER}>", "<selftest@example.com>"))
    except OSError as error:
        return Finding(door.where, "ok", f"{who} is not believed: {error}")
    if reply.positive:
        return Finding(door.where, "failed", f"OPEN RELAY: {who} is believed: {reply}")
    return Finding(door.where, "ok", f"{who} is not believed: {reply}")


def proxy_header(client: str) -> bytes:
    """Return the PROXY protocol's header (version 1) for a client at `client`."""
    family, server = ("TCP6", "2001:db8::25") if ":" in client else ("TCP4", "192.0.2.25")
    return f"PROXY {family} {client} {server} 50000 25\r\n".encode()


class _Sessions:
    """The sessions in which probes are tried, one for as many as it lasts."""

    def __init__(self, door: Door, *, secured: bool) -> None:
        self._door = door
        self._secured = secured
        self._open: Wire | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def attempt(self, probe: Probe) -> Reply:
        """Return the reply that decides; a session that ends in the middle is tried again once, anew."""
        if self._open is not None and not probe.special:
            with contextlib.suppress(OSError):
                reply = _try(self._open, probe)
                if reply.code != 421:
                    return reply
        self._leave()
        try:
            self._open = self._door.enter(probe.hello, secured=self._secured)
        except RefusedError as error:
            if probe.special and not error.reply.transient:
                return error.reply  # what is special about it has been refused
            raise
        reply = _try(self._open, probe)
        if probe.special:
            self._leave()
        return reply

    def _leave(self) -> None:
        wire, self._open = self._open, None
        if wire is not None:
            wire.close()


def _try(wire: Wire, probe: Probe) -> Reply:
    """Say MAIL and RCPT, then RSET; return the reply that decides."""
    for claim in probe.claims:
        wire.say(claim)
    mail, rcpt = f"MAIL FROM:{probe.sender}", f"RCPT TO:{probe.recipient}"
    if probe.together:
        first, second = wire.say_together(mail, rcpt)
        reply = second if first.positive or second.positive else first
    else:
        reply = wire.say(mail)
        if reply.positive:
            reply = wire.say(rcpt)
    with contextlib.suppress(OSError):  # whatever becomes of the session, this probe is decided
        wire.say("RSET")
    return reply


def _expect(reply: Reply, code: int) -> None:
    if reply.code != code:
        raise RefusedError(reply)


def _few(said: Sequence[str]) -> str:
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more
