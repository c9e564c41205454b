"""One TCP connection as a test's peer needs it: octets in, in numbered reads, and blunt ways out.

Rules: nothing here knows SMTP beyond CRLF. Reads are numbered so that a test can tell which commands came
in one segment; closing, resetting, not reading are separate verbs, since each one looks different to the
other side.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["GoneError", "Wire"]


class GoneError(Exception):
    """The other side has closed or reset the connection."""


class Wire(asyncio.Protocol):
    """The octets of one connection. `changed` is called after each event; `started` once, when it is up.

    What arrived before the connection ended can still be taken after it, also after a reset.
    """

    def __init__(
        self, started: Callable[[Wire], None] = lambda wire: None, changed: Callable[[], None] = lambda: None
    ) -> None:
        self._started = started
        self._changed = changed
        self._buffer = bytearray()
        self._taken = 0
        self._marks: deque[tuple[int, int]] = (
            deque()
        )  # (octets that had arrived after it, number of the read)
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._transport: asyncio.Transport | None = None
        self.reads = 0
        """How many times octets have arrived."""
        self.eof = False
        """The other side sends nothing more."""
        self.lost = False
        """The connection is over."""

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._started(self)
        self._changed()

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        self._buffer += data
        self._marks.append((self._taken + len(self._buffer), self.reads))
        self._event()

    def eof_received(self) -> bool:
        self.eof = True
        self._event()
        # Stay open for writing where TCP allows it: a client may half-close and wait for its reply.
        return not self.secured

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._room.set()
        self._event()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    # What the dialogue calls.

    @property
    def waiting(self) -> bytes:
        """Octets that have arrived and were not taken yet."""
        return bytes(self._buffer)

    @property
    def local_address(self) -> str:
        """This end's ADDRESS:PORT."""
        host, port = self._up.get_extra_info("sockname")[:2]
        return f"{host}:{port}"

    @property
    def peer_port(self) -> int:
        """The other end's port."""
        return int(self._up.get_extra_info("peername")[1])

    @property
    def meets_itself(self) -> bool:
        """Whether both ends are this one, by TCP's simultaneous open: on a port on which nobody listens."""
        return bool(self._up.get_extra_info("sockname") == self._up.get_extra_info("peername"))

    @property
    def secured(self) -> bool:
        """Whether TLS is on."""
        return self._up.get_extra_info("ssl_object") is not None

    async def line(self, limit: int = 64 * 1024) -> tuple[bytes, int]:
        """Return the next line without its CRLF, and the number of the read that completed it.

        A line longer than `limit` octets raises ValueError.
        """
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > limit:
                raise ValueError(f"a line of more than {limit} octets")
            await self._more()
        line = bytes(self._take(end + 2)[:-2])
        while self._marks[0][0] < self._taken:
            self._marks.popleft()
        return line, self._marks[0][1]

    async def octets(self) -> bytes:
        """Return whatever has arrived, at least one octet."""
        while not self._buffer:
            await self._more()
        return self.discard()

    def discard(self) -> bytes:
        """Take what has arrived, perhaps nothing."""
        return self._take(len(self._buffer))

    def give_back(self, octets: bytes) -> None:
        """Put octets that were just taken back in front of those that wait."""
        self._buffer[:0] = octets
        self._taken -= len(octets)

    async def gone(self) -> None:
        """Return once the other side has closed; what it still sends is dropped."""
        while not (self.eof or self.lost):
            self.discard()
            self._arrived.clear()
            await self._arrived.wait()

    async def ended(self) -> None:
        """Return once the connection is over on this side too, its socket closed."""
        while not self.lost:
            self._arrived.clear()
            await self._arrived.wait()

    def send(self, octets: bytes) -> None:
        """Write octets; a connection that is gone swallows them."""
        if not self.lost:
            self._up.write(octets)

    async def drain(self) -> None:
        """Return once what was written needs little room, or can never be sent."""
        await self._room.wait()

    async def secure(self, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """Run a TLS handshake: the server's half, or with `server_name` the client's.

        A server calls it with no await after the reply that invites it.
        """
        loop = asyncio.get_running_loop()
        self.discard()  # octets sent before the handshake must never count as sent within it
        transport = await loop.start_tls(
            self._up, self, context, server_side=server_name is None, server_hostname=server_name
        )
        if transport is None:
            raise GoneError
        self._transport = transport

    def certificate(self) -> dict[str, Any]:
        """Return what the other side's certificate says, as `SSLSocket.getpeercert` does."""
        found: dict[str, Any] = self._up.get_extra_info("peercert")
        return found

    def pause(self) -> None:
        """Stop reading: the other side's window fills up."""
        self._up.pause_reading()

    def resume(self) -> None:
        """Read again."""
        self._up.resume_reading()

    def half_close(self) -> None:
        """Send what is written, then FIN, and go on reading."""
        self._up.write_eof()

    def close(self) -> None:
        """Send what is written, then FIN; read nothing more."""
        if not self.lost:
            self._up.close()

    def abort(self) -> None:
        """End the connection now, written or not."""
        if not self.lost:
            self._up.abort()

    def reset(self) -> None:
        """End the connection with RST."""
        if self.lost:
            return
        peer: socket.socket = self._up.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._up.abort()

    @property
    def _up(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._taken += count
        return taken

    async def _more(self) -> None:
        if self.eof or self.lost:
            raise GoneError
        self._arrived.clear()
        await self._arrived.wait()

    def _event(self) -> None:
        self._arrived.set()
        self._changed()
