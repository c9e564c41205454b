"""What a client that sends much at a time sends, read in blocks.

Event loops read all there is, up to 256 KiB, and what an upstream does not take at once stays in memory: with
thousands of clients in a body that is gigabytes. A client that sends little is read as the loop does it,
which costs less for each read.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from relay.session.session import Session

__all__ = ["BLOCK", "Blocks"]

BLOCK: Final = 48 * 1024
"""Octets that are read at once from such a client: with all else that is kept for it, it has 64 KiB."""


class Blocks(asyncio.BufferedProtocol):
    """Stands in for a session at its transport, reads by way of a buffer, and gives all to the session."""

    __slots__ = ("_buffer", "_session")

    def __init__(self, session: Session, buffer: bytearray) -> None:
        """Read into `buffer`, of BLOCK octets; all sessions of a loop share it, since each takes at once."""
        self._session = session
        self._buffer = buffer

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return where to read into."""
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Give what has come to the session."""
        with memoryview(self._buffer) as read:
            block = read[:nbytes].tobytes()
        self._session.data_received(block)

    def eof_received(self) -> bool:
        """The client will send no more."""
        return self._session.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._session.connection_lost(error)

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self._session.pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._session.resume_writing()
