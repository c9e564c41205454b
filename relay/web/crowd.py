"""Who is connected over HTTP: so many at most, and who has been quiet for longest makes room.

Rules. Each connection takes a file descriptor, which the next client of SMTP may need, and nobody has to send
a request. So there is no time in which one has to come, and no connection is refused while another is idle:
a crowd that says nothing keeps no scraper and no health check out. Who is being answered stays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

__all__ = ["MAX_CONNECTIONS", "Crowd"]

MAX_CONNECTIONS: Final = 64
"""Connections at the same time; `descriptors.BESIDE` has room for them."""


class Crowd:
    """The connections of one server."""

    def __init__(self) -> None:
        self._heard: dict[asyncio.BaseProtocol, float] = {}
        """When each was heard of last: when it came, or its last request began or ended."""
        self._busy: set[asyncio.BaseProtocol] = set()

    def joins(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        """Return what makes the protocol of each connection to `server`."""
        loop = asyncio.get_running_loop()

        def join() -> asyncio.Protocol:
            # It is connected in the next turn of the loop; who has to go for it goes in the one after.
            loop.call_soon(loop.call_soon, self._make_room, server)
            return server()

        return join

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Note who is being answered."""
        protocol = request.protocol
        self._heard[protocol] = time.monotonic()
        self._busy.add(protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(protocol)
            self._heard[protocol] = time.monotonic()

    def _make_room(self, server: web.Server) -> None:
        now = time.monotonic()
        connected = {each: each.transport for each in server.connections if each.transport is not None}
        self._heard = {each: self._heard.get(each, now) for each in connected}
        idle = [each for each in connected if each not in self._busy]  # who has just come among them
        for each in sorted(idle, key=self._heard.__getitem__)[: max(0, len(connected) - MAX_CONNECTIONS)]:
            connected[each].abort()  # to close it would wait until all is read that was sent
