"""A TCP proxy that puts an upstream at a distance: each octet takes half a round trip in each direction.

Rules: time is added, throughput is not taken: what comes in together goes out together, later. Connecting
costs what it costs on a wire: the upstream sees the connection after one and a half round trips (SYN,
SYN-ACK, ACK), so that its greeting arrives after two. Prints its port on the first line of standard output
and runs until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections import deque
from typing import cast

import uvloop


class End(asyncio.Protocol):
    """One end of a connection through the proxy: what it receives leaves at the other end, later."""

    def __init__(self, late: float) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: End | None = None
        self._late = late
        self._queue: deque[bytes | None] = deque()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self._later(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio passes it
        self._later(None)

    def _later(self, data: bytes | None) -> None:
        self._queue.append(data)
        self._loop.call_later(self._late, self._now)

    def _now(self) -> None:
        # Each timer lets the oldest go, so that the order of what arrived together cannot change.
        data = self._queue.popleft()
        other = self.other.transport if self.other else None
        if other is None or other.is_closing():
            return
        if data is None:
            other.close()
        else:
            other.write(data)


class Near(End):
    """The client's end."""

    def __init__(self, late: float, port: int) -> None:
        super().__init__(late)
        self._port = port
        self._dialling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._dialling = self._loop.create_task(self._dial())

    async def _dial(self) -> None:
        await asyncio.sleep(3 * self._late)
        far = End(self._late)
        self.other, far.other = far, self
        try:
            await self._loop.create_connection(lambda: far, "127.0.0.1", self._port)
        except OSError:
            assert self.transport is not None
            self.transport.close()


async def serve(port: int, round_trip: float) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_server(lambda: Near(round_trip / 2, port), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    server.close()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=int, required=True, help="port of the upstream on 127.0.0.1")
    parser.add_argument("--round-trip", type=float, required=True, help="seconds")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.to, arguments.round_trip))


if __name__ == "__main__":
    main()
