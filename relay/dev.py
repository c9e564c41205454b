"""The built-in upstream of `relay serve --dev` and `relay demo`: sends nothing, keeps the last messages.

It accepts everything, but for recipients whose local part begins with one of these words, so that people can
see what their application does then: `reject@`, `spam@`, `defer@`, `slow@`, `drop@` (`Manner`). Any login is
good, so that pass-through can be tried.

It serves on a socket that listens already: whoever needs its address to make a configuration has the socket
first, so that nobody can take the port in between.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from aiosmtpd import smtp

from relay.settings import DEV_UPSTREAM
from relay.settings.address import Address

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DevUpstream", "Manner", "Message", "by_local_part", "listen", "listen_usually"]

KEPT = 100
"""Messages that are kept in memory."""
MAX_SIZE = 50 * 1024 * 1024
"""Octets of one message."""
SLOW_S = 3.0
"""How long the verdict on a message to `slow@` takes."""


class Manner(StrEnum):
    """How the upstream treats a recipient."""

    ACCEPT = "accept"
    REJECT = "reject"
    """The recipient is refused for good."""
    SPAM = "spam"
    """The message is refused for good, after its end of data."""
    DEFER = "defer"
    """The recipient is told to come later."""
    SLOW = "slow"
    """The verdict on the message takes its time."""
    DROP = "drop"
    """The connection breaks in place of the verdict: the message is in doubt."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message that the built-in upstream accepted."""

    reverse_path: str
    recipients: tuple[str, ...]
    content: bytes


def by_local_part(recipient: str) -> Manner:
    """Return the manner that the local part begins with: `reject@`, `reject+ann@`, `reject.ann@`."""
    local = recipient.rpartition("@")[0].lower()
    word = local.partition("+")[0].partition(".")[0]
    return Manner(word) if word in set(Manner) else Manner.ACCEPT


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there, for a DevUpstream. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def listen_usually() -> socket.socket:
    """Listen where the upstream of `relay serve --dev` usually is, or at a free port where that is taken.

    Raises OSError.
    """
    usual = Address.parse(DEV_UPSTREAM)
    try:
        return listen(usual.host, usual.port)
    except OSError:
        return listen(usual.host, 0)


class DevUpstream:
    """An SMTP server on loopback that accepts every message and keeps the last ones, but for its manners."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        manner: Callable[[str], Manner] = by_local_part,
        slow_s: float = SLOW_S,
    ) -> None:
        """Serve on this socket, and close it at the end."""
        self._listening = listening
        self._manner = manner
        self._slow_s = slow_s
        self._count = 0
        self._server: asyncio.Server | None = None
        self.messages: deque[Message] = deque(maxlen=KEPT)

    async def handle_RCPT(  # noqa: N802
        self, _server: smtp.SMTP, _session: smtp.Session, envelope: smtp.Envelope, address: str, _: list[str]
    ) -> str:
        """Take a recipient, or not (called by aiosmtpd)."""
        match self._manner(address):
            case Manner.REJECT:
                return "550 5.1.1 no such user here (the built-in upstream was asked to reject)"
            case Manner.DEFER:
                return "451 4.7.1 greylisted, come again later (the built-in upstream was asked to defer)"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, server: smtp.SMTP, _session: smtp.Session, envelope: smtp.Envelope) -> str:  # noqa: N802
        """Keep the message, or do as its recipients ask (called by aiosmtpd)."""
        manners = {self._manner(recipient) for recipient in envelope.rcpt_tos}
        if Manner.SLOW in manners:
            await asyncio.sleep(self._slow_s)
        if Manner.DROP in manners:
            # uvloop's transports are none of asyncio's by their class.
            cast("asyncio.WriteTransport", server.transport).abort()
            return "451 4.4.2 dropped"
        if Manner.SPAM in manners:
            return "554 5.7.1 looks like spam (the built-in upstream was asked to reject)"
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        self._count += 1
        self.messages.append(Message(envelope.mail_from or "", tuple(envelope.rcpt_tos), content))
        return f"250 2.0.0 kept as dev-{self._count}, sent to nobody"

    async def __aenter__(self) -> DevUpstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: smtp.SMTP(
                self,
                hostname="dev.upstream",
                data_size_limit=MAX_SIZE,
                enable_SMTPUTF8=True,
                auth_require_tls=False,
                authenticator=_anybody,
            ),
            sock=self._listening,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()


def _anybody(*_: object) -> smtp.AuthResult:
    return smtp.AuthResult(success=True)
