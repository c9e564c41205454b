"""A wire tap between a client and the relay, for clients whose octets a test cannot know beforehand.

Rules: it changes nothing, delays nothing and takes no part; what each side wrote is kept as it came.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.support.upstream import Message

__all__ = ["Tap", "Tapped"]

_BLOCK = 256 * 1024
_WAIT_S = 10.0


@dataclass
class Tapped:
    """One connection that went through the tap."""

    sent: bytearray = field(default_factory=bytearray)
    """What the client wrote."""
    heard: bytearray = field(default_factory=bytearray)
    """What the relay answered."""


class Tap:
    """Listens on 127.0.0.1 and carries every connection to the relay's `port`."""

    def __init__(self, port: int) -> None:
        self._relay_port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.sessions: list[Tapped] = []
        """One for each connection, in order."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self.ended()

    async def ended(self) -> None:
        """Return once every connection is over, on both sides."""
        async with asyncio.timeout(_WAIT_S):
            while self._tasks:
                await asyncio.wait(self._tasks)

    def carried(self, message: Message) -> bool:
        """Whether a client wrote exactly what the upstream got: MAIL, the accepted RCPTs, DATA, the content.

        A verb may differ in case: the relay writes its own.
        """
        commands = [message.mail, *message.rcpts, b"DATA"]
        head = b"".join(command + b"\r\n" for command in commands)
        for session in self.sessions:
            begin = session.sent.find(b"\r\n" + message.wire + b".\r\n") + 2
            found = bytes(session.sent[max(0, begin - len(head)) : begin])
            if [_capital(line) for line in found.split(b"\r\n")] == head.split(b"\r\n"):
                return True
        return False

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        tapped = Tapped()
        self.sessions.append(tapped)
        relay_reader, relay_writer = await asyncio.open_connection("127.0.0.1", self._relay_port)
        self._writers |= {writer, relay_writer}
        try:
            await asyncio.gather(
                self._copy(reader, relay_writer, tapped.sent), self._copy(relay_reader, writer, tapped.heard)
            )
        finally:
            relay_writer.transport.abort()
            writer.transport.abort()
            self._writers -= {writer, relay_writer}

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        with contextlib.suppress(ConnectionError):
            while block := await reader.read(_BLOCK):
                kept += block
                writer.write(block)
                await writer.drain()
            writer.write_eof()


def _capital(line: bytes) -> bytes:
    verb, blank, rest = line.partition(b" ")
    return verb.upper() + blank + rest
