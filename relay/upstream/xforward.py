"""XFORWARD: an upstream that offers it is told who a message's client is, for its own log and headers.

The command is Postfix's (XFORWARD_README); it says nothing that permits anything. Rules: only attributes that
the upstream offered, and all of those that are known here, so that nothing of an earlier client is left in
force on a connection that clients share; what is not known is said to be so. What the client chose itself
(its name in EHLO) goes up as one word of harmless characters, whatever it sent. Pure functions of values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.policy import client_address

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

__all__ = ["Client", "command"]

MAX_VALUE = 255
"""Octets of one encoded value (XFORWARD_README, note 1)."""

_UNAVAILABLE = b"[UNAVAILABLE]"
_TO_ENCODE = re.compile(rb"[+=]")
# Note 1: a decoded value holds no controls, nothing beyond ASCII, no space and nothing special in headers.
_TO_CENSOR = re.compile(rb'[^!-~]|[<>()\\";@]')


@dataclass(frozen=True, slots=True)
class Client:
    """Who a message comes from."""

    address: str
    """The IP address that it connects from; `unix` for a unix socket; any other word: it is not known."""
    port: int | None
    """The TCP port that it connects from; None: there is none, or it is not known."""
    helo: bytes
    """What it said behind EHLO or HELO."""
    esmtp: bool
    """Whether that was EHLO."""


def command(offered: Collection[str], client: Client, task_id: UUID) -> bytes | None:
    """Return the command line for one transaction, CRLF included; None if there is nothing to tell.

    `offered`: the attributes in the upstream's EHLO reply, in upper case. The line has less than the 512
    octets that a command may have (RFC 5321 4.5.3.1.4), with every attribute at its longest.
    """
    address = client_address(client.address)
    local = client.address == "unix" if address is None else address.is_loopback
    values = {
        "IDENT": str(task_id).encode("ascii"),
        "PROTO": b"ESMTP" if client.esmtp else b"SMTP",
        "HELO": _helo(client.helo),
        "SOURCE": b"LOCAL" if local else b"REMOTE",
        "NAME": _UNAVAILABLE,  # no reverse lookup is made
        "PORT": _UNAVAILABLE if client.port is None else b"%d" % client.port,
        # Last: a Postfix with inet_protocols = ipv4 refuses an IPv6 address, and keeps what stands before it.
        "ADDR": _UNAVAILABLE if address is None else _address(str(address)),
    }
    words = [b"%b=%b" % (name.encode("ascii"), value) for name, value in values.items() if name in offered]
    return b" ".join((b"XFORWARD", *words)) + b"\r\n" if words else None


def _address(text: str) -> bytes:
    """IPv6 as in an address literal (RFC 5321 4.1.3), without its brackets."""
    return (f"IPV6:{text}" if ":" in text else text).encode("ascii")


def _helo(said: bytes) -> bytes:
    value = _xtext(_TO_CENSOR.sub(b"?", said.strip()))
    return value if 0 < len(value) <= MAX_VALUE else _UNAVAILABLE


def _xtext(value: bytes) -> bytes:
    """Encode printable ASCII as RFC 3461 section 4 asks."""
    return _TO_ENCODE.sub(lambda found: b"+%02X" % ord(found[0]), value)
