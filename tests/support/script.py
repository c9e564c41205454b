"""What a scripted upstream may be told to do, stage by stage; values only.

Rules: a reply is plain bytes and goes out as it is, right or wrong; the dialogue then goes on as its code
says. Everything that is not a whole reply has a class of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import Connection

__all__ = [
    "STAGES",
    "Action",
    "AfterOctets",
    "Close",
    "Delay",
    "Garbage",
    "HalfReply",
    "Plan",
    "Reset",
    "Script",
    "Silence",
    "StopReading",
]

STAGES: tuple[str, ...] = (
    *("connect", "greeting", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "body", "end_of_data"),
    *("chunk", "BDAT", "RSET", "NOOP", "QUIT", "XFORWARD"),
)
"""HELO counts as EHLO; an action at AUTH stands for the whole exchange; `connect` is before the greeting;
`chunk` is inside a chunk as `body` is inside the content after DATA, `BDAT` the reply to a chunk that is not
the last one, `end_of_data` the reply to that."""


@dataclass(frozen=True)
class Close:
    """Send `reply`, if any, as a reply that counts; then close."""

    reply: bytes = b""


@dataclass(frozen=True)
class Reset:
    """Send `reply`, if any, as a reply that counts; then reset the connection (RST)."""

    reply: bytes = b""


@dataclass(frozen=True)
class Silence:
    """Say nothing, now and later; go on reading until the client leaves."""


@dataclass(frozen=True)
class Garbage:
    """Send octets that are no reply, and go on as if nothing had been asked."""

    octets: bytes = b"\x16\x03\x01 what is this\r\n"


@dataclass(frozen=True)
class HalfReply:
    """Send part of a reply, which does not count; then close."""

    octets: bytes = b"250-2.0.0 to be conti"


@dataclass(frozen=True)
class Delay:
    """Wait for an event, or for seconds, then act (None: as usual)."""

    until: asyncio.Event | float
    then: Action | None = None


@dataclass(frozen=True)
class StopReading:
    """In a body: read nothing more until the test calls `connection.wire.resume()`."""


@dataclass(frozen=True)
class AfterOctets:
    """In a body: act once `count` octets of it have been read. An action without this acts at the first."""

    count: int
    then: Action


Action = bytes | Close | Reset | Silence | Garbage | HalfReply | Delay | StopReading | AfterOctets
Plan = (
    Action
    | None
    | Sequence["Plan"]
    | Mapping[str, "Plan"]
    | Callable[[str, bytes, "Connection"], "Action | None"]
)
Script = Mapping[str, Plan]
"""Stage -> what to do there: an action; a list, one for each time the stage is reached, over all connections,
and as usual after its end; a dict from a part of the command line to a plan; a callable (stage, line,
connection). None anywhere means: as usual."""
