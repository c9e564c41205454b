"""The built-in upstream of `relay serve --dev`: accepts everything, sends nothing, keeps the last ones."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiosmtpd import smtp

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DevUpstream", "Message"]

KEPT = 100
"""Messages that are kept in memory."""
MAX_SIZE = 50 * 1024 * 1024
"""Octets of one message."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message that the built-in upstream accepted."""

    reverse_path: str
    recipients: tuple[str, ...]
    content: bytes


class DevUpstream:
    """An SMTP server on loopback that accepts every message and keeps the last ones."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._count = 0
        self._server: asyncio.Server | None = None
        self.messages: deque[Message] = deque(maxlen=KEPT)

    async def handle_DATA(self, _server: smtp.SMTP, _session: smtp.Session, envelope: smtp.Envelope) -> str:  # noqa: N802
        """Keep the message (called by aiosmtpd)."""
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        self._count += 1
        self.messages.append(Message(envelope.mail_from or "", tuple(envelope.rcpt_tos), content))
        return f"250 2.0.0 kept as dev-{self._count}, sent to nobody"

    async def __aenter__(self) -> DevUpstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: smtp.SMTP(self, hostname="dev.upstream", data_size_limit=MAX_SIZE, enable_SMTPUTF8=True),
            self._host,
            self._port,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
