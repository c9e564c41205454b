"""What a listener shows to anybody who connects: encryption, AUTH, its certificate, what its replies tell."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from relay import __version__
from relay.selftest.finding import Finding, Level
from relay.selftest.probes import HELLO, SENDER
from relay.selftest.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.selftest.strangers import Door

__all__ = ["manners"]

EXPIRES_SOON = 14.0
"""Days before its end from which a certificate is worth a note."""
_TELLING = (__version__, "aiosmtpd", "python")
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
_AUTH = "AUTH PLAIN"


def manners(door: Door, *, clear_auth: bool) -> Iterator[Finding]:
    """Look at all that shows without sending mail; raises OSError when the listener cannot be talked to.

    `clear_auth`: the configuration wants AUTH without TLS here.
    """

    def found(good: bool, text: str, otherwise: Level = "failed") -> Finding:
        return Finding(door.where, "ok" if good else otherwise, text)

    if door.mode != "implicit":
        with door.enter(secured=False) as wire:
            yield from (found(*finding) for finding in _in_clear(wire, door.mode, clear_auth=clear_auth))
    if door.mode in ("starttls", "required"):
        yield found(*_injected(door))
    if door.mode != "none":
        with door.enter(secured=True) as wire:
            yield found(*_certificate(door, wire))
            offered = _keywords(wire)
            yield found("STARTTLS" not in offered, f"over {wire.protocol}: {_offers(offered)}")
    with door.enter(secured=door.mode != "none") as wire:
        yield found(*_reveals_users(wire))
    yield found(*_reveals_itself(door))


_Said = tuple[bool, str] | tuple[bool, str, Level]


def _in_clear(wire: Wire, mode: str, *, clear_auth: bool) -> Iterator[_Said]:
    offered = _keywords(wire)
    wanted = mode in ("starttls", "required")
    yield ("STARTTLS" in offered) is wanted, f"in clear: {_offers(offered)}"
    reply = wire.say(_AUTH)
    taken = reply.code == 334
    if taken:
        wire.say("*")  # RFC 4954 section 4: the client gives up
    if taken or "AUTH" in offered:
        yield (
            False,
            f"takes passwords in clear: {_AUTH} is answered {reply}",
            "note" if clear_auth else "failed",
        )
    else:
        yield True, f"takes no password in clear: {_AUTH} is answered {reply}"
    if mode == "required":
        reply = wire.say(f"MAIL FROM:<{SENDER}>")
        yield not reply.positive, f"MAIL before STARTTLS is answered {reply}"


def _injected(door: Door) -> _Said:
    """RFC 3207 section 4.2: what was sent in clear behind STARTTLS must not count as sent under TLS."""
    what = "a command behind STARTTLS in the same segment"
    try:
        with door.enter(secured=False) as wire:
            reply = wire.say("STARTTLS\r\nXINJECTED")
            if reply.code != 220:
                return True, f"{what} ends it: {reply}"
            wire.secure()
            reply = wire.say("NOOP")
    except OSError as error:
        return True, f"{what} ends the connection: {error}"
    return reply.code == 250, f"{what} is {'thrown away' if reply.code == 250 else f'obeyed: {reply}'}"


def _certificate(door: Door, wire: Wire) -> _Said:
    """What the certificate says; read by trusting it, since only a certificate that is trusted is read."""
    try:
        with _bare(door) as second:
            if door.mode != "implicit":
                second.reply()
                second.say(HELLO)
                second.say("STARTTLS")
            second.secure(trust=wire.certificate)
            described = second.described()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return False, "its certificate has expired"
        return False, f"its certificate cannot be used: {error.verify_message}", "note"
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(described["notAfter"])), UTC)
    days = (ends - datetime.now(UTC)).total_seconds() / 86400
    names = described.get("subjectAltName", ())
    listed = ", ".join(str(name[1]) for name in names) if isinstance(names, tuple) else ""
    text = f"its certificate is for {listed or 'no name'}, until {ends:%Y-%m-%d}"
    return (True, text) if days > EXPIRES_SOON else (False, f"{text}: {days:.0f} days left", "note")


def _bare(door: Door) -> Wire:
    """Connect and say nothing."""
    return Wire(door.place, door.caller.source, door.caller.preface)


def _reveals_users(wire: Wire) -> _Said:
    replies = {command: wire.say(command) for command in ("VRFY root", "VRFY postmaster", "EXPN staff")}
    telling = [f"{command}: {reply}" for command, reply in replies.items() if reply.code in (250, 251)]
    if telling:
        return False, f"tells who has a mailbox: {'; '.join(telling)}"
    return True, "VRFY and EXPN tell nothing"


def _reveals_itself(door: Door) -> _Said:
    said = []
    with _bare(door) as wire:
        if door.mode == "implicit":
            wire.secure()
        said.append(str(wire.reply()))
        said += [str(wire.say(command)) for command in (HELLO, "HELP", "XSELFTEST")]
    telling = [line for line in said if any(word in line.lower() for word in _TELLING)]
    if telling:
        return False, f"tells what it is made of: {telling[0]}"
    return True, f"tells no version: {said[0]}"


def _keywords(wire: Wire) -> dict[str, str]:
    """What EHLO offers, said again on a session that has said it."""
    lines = wire.say(HELLO).lines[1:]
    return {line.partition(" ")[0].upper(): line for line in lines}


def _offers(offered: dict[str, str]) -> str:
    shown = [offered[keyword] for keyword in ("STARTTLS", "AUTH") if keyword in offered]
    return f"offers {' and '.join(shown)}" if shown else "offers neither STARTTLS nor AUTH"
