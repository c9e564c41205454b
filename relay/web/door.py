"""Where HTTP is listened on, and who answers there once all that takes is loaded.

Rules: it listens before there is anybody who answers, so that an address that cannot be had ends the start,
and who comes meanwhile waits in the kernel's queue. To load aiohttp takes a fifth as long as a start, so that
happens beside the first mail, not before it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from relay.late import late

if TYPE_CHECKING:
    from relay.settings import Settings

__all__ = ["BindError", "Server", "Web"]


class BindError(OSError):
    """The address cannot be listened on; the text is one line for the operator."""


class Server(Protocol):
    """Who answers; `relay.web.server.Server`."""

    async def serve(self, listening: Sequence[socket.socket], /) -> None:
        """Answer there."""

    def follow(self, settings: Settings, /) -> None:
        """Go by changed settings."""

    async def stop(self) -> None:
        """Close these sockets and finish the answers that are on their way."""


class Web:
    """The HTTP side at one address."""

    def __init__(self, make_server: Callable[[], Server]) -> None:
        """`make_server` is called in a thread, and loads what it needs."""
        self._make_server = make_server
        self._listening: list[socket.socket] = []
        self._server: Server | None = None
        self._changed: Settings | None = None  # before there was a server
        self.port = 0
        """The TCP port, once it listens; useful when port 0 was asked for."""

    async def start(self, host: str, port: int) -> None:
        """Listen and answer; raises BindError."""
        await self.listen(host, port)
        await self.answer()

    async def listen(self, host: str, port: int) -> None:
        """Listen on `host` (an IP address or a name) and `port`, 0 for any; raises BindError."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                self._listening.append(socket.create_server(address, family=family))
        except OSError as error:
            await self.stop()
            reason = error.strerror or str(error)
            raise BindError(f"http.address: cannot listen on {host} port {port}: {reason}") from error
        self.port = self._listening[0].getsockname()[1]

    async def answer(self) -> None:
        """Answer whoever comes, and who waits; raises what cannot be loaded."""
        server = await late(self._make_server)
        if self._changed is not None:
            server.follow(self._changed)
        self._server = server
        await server.serve(self._listening)

    def follow(self, settings: Settings) -> None:
        """Go by changed settings: who gets the site. The address stays."""
        if self._server is not None:
            self._server.follow(settings)
        else:
            self._changed = settings

    async def stop(self) -> None:
        """Close the listener and finish the answers that are on their way; harmless when not started."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop()
        for each in self._listening:
            each.close()
        self._listening.clear()
