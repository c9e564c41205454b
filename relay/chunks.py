"""The message in chunks as BDAT brings it (RFC 3030): sizes, stray newlines, the header section. No I/O.

Rules, in force for every way in which TCP and the client may cut the octets:

- A chunk is as long as was announced, whatever is in it: nothing inside it ends anything.
- Not one octet is changed, added or held back: the sizes are announced before the octets come.
- A bare CR, a bare LF or NUL is a fault, also where chunks meet, unless the client has said
  BODY=BINARYMIME. A CR at the very end of the message is bare.
- A message larger than its limit is at fault as soon as that is announced.
"""

from __future__ import annotations

from typing import Final

from relay.content import Fault, Header, clean, far_beyond

__all__ = ["MAX_CHUNK", "Chunks"]

MAX_CHUNK: Final = 2**31 - 1
"""Octets of one chunk. A larger size could be a small one to an upstream that counts in 32 bits, and the rest
of the chunk commands."""


class Chunks:
    """One message on its way from the client to the upstream.

    `begin` announces a chunk, `feed` takes its octets and returns what may go upstream now. After a `fault`
    nothing more is returned, but the octets are still counted, so that the session stays in step.
    """

    __slots__ = (
        "_after_cr",
        "_announced",
        "_beyond_count",
        "_binary",
        "_header",
        "_last",
        "_max_size",
        "fault",
        "left",
        "received",
        "size",
    )

    def __init__(self, *, max_size: int, binary: bool) -> None:
        """Begin a message; `max_size` in octets (0: no limit), `binary`: BODY=BINARYMIME was said."""
        self._max_size = max_size
        self._binary = binary
        self._header = Header()
        self._after_cr = False
        self._announced = 0
        self._beyond_count = False
        self._last = False
        self.left = 0
        """Octets of the chunk that are still to come."""
        self.fault: Fault | None = None
        self.received = 0
        """Octets from the client so far."""
        self.size = 0
        """Octets of the content so far; as there is no stuffing, each one counts (RFC 1870)."""

    @property
    def ended(self) -> bool:
        """Whether the last octet of the last chunk has come."""
        return self._last and not self.left

    @property
    def hopeless(self) -> bool:
        """Whether so much was announced beyond the size limit that reading it is not worth it."""
        return self._beyond_count or far_beyond(self._announced, self._max_size)

    @property
    def header_complete(self) -> bool:
        """Whether the header section has passed, or as much of it as is kept."""
        return self._header.complete

    @property
    def header(self) -> bytes:
        """The header section as it went upstream, without the empty line."""
        return self._header.octets

    def begin(self, size: int, *, last: bool) -> None:
        """Announce a chunk of `size` octets; only when nothing is `left` of the one before."""
        self.left, self._last = size, last
        self._announced += size
        self._beyond_count = size > MAX_CHUNK
        too_large = self._beyond_count or (self._max_size and self._announced > self._max_size)
        if too_large and self.fault is None:
            self.fault = Fault.TOO_LARGE
        if self.ended:
            self._end()

    def feed(self, octets: bytes) -> bytes:
        """Take octets of the chunk, no more than are `left`; return those that may go upstream."""
        self.left -= len(octets)
        self.received += len(octets)
        if self.fault is None and octets:
            self._look(octets)
        if self.ended:
            self._end()
        return b"" if self.fault is not None else octets

    def _look(self, octets: bytes) -> None:
        self.size += len(octets)
        if not self._binary:
            self._look_for_strays(octets)
        if self.fault is None and not self._header.complete:
            self._header.keep(octets)

    def _look_for_strays(self, octets: bytes) -> None:
        # A pair may be cut between two calls.
        if self._after_cr:
            if not octets.startswith(b"\n"):
                self.fault = Fault.STRAY_NEWLINE
            octets = octets.removeprefix(b"\n")
        self._after_cr = octets.endswith(b"\r")
        octets = octets.removesuffix(b"\r")
        if not clean(octets):
            self.fault = Fault.NUL if b"\0" in octets else Fault.STRAY_NEWLINE

    def _end(self) -> None:
        if self._after_cr and self.fault is None:
            self.fault = Fault.STRAY_NEWLINE
        self._header.end()
