"""What content has in common, come it by DATA or BDAT: faults, size limit, header section. No I/O."""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["MAX_HEADER", "MAX_RECEIVED_OVERSHOOT", "Fault", "Header", "clean", "far_beyond"]

MAX_HEADER: Final = 64 * 1024
"""Octets of the header section that are kept for classification; the rest streams past."""
MAX_RECEIVED_OVERSHOOT: Final = 1024 * 1024
"""Octets that are still read after the size limit was passed, beyond half of that limit."""


class Fault(Enum):
    """Why a message cannot go out, found while it streams."""

    TOO_LARGE = "too_large"
    STRAY_NEWLINE = "stray_newline"
    NUL = "nul"


def far_beyond(size: int, limit: int) -> bool:
    """Whether `size` is so far beyond the size limit (0: none) that reading on is no longer worth it."""
    return bool(limit) and size > limit + limit // 2 + MAX_RECEIVED_OVERSHOOT


def clean(content: bytes) -> bool:
    """Whether all CR and LF stand in pairs, and no NUL anywhere.

    Every CR is taken out, and one put back before every LF: what is the same then had them so. A detour that
    takes a fifth of the time of counting pairs, since single octets are sought at memory's speed.
    """
    return content.replace(b"\r", b"").replace(b"\n", b"\r\n") == content and content.find(b"\0") < 0


class Header:
    """The header section of a message, kept as its content passes."""

    __slots__ = ("_kept", "complete", "octets")

    def __init__(self) -> None:
        self._kept: bytearray | None = None
        self.complete = False
        """Whether the header section has passed, or as much of it as is kept."""
        self.octets = b""
        """Once complete: the header section as it went upstream, at most MAX_HEADER octets, without the empty
        line."""

    def keep(self, content: bytes) -> None:
        """Keep of the next `content` what belongs to the header section; only as long as not `complete`."""
        kept = self._kept
        if kept is None:
            # In one piece, as it comes nearly always: 1.0 us, and 2.9 on the way below (CPython 3.11).
            end = content.find(b"\r\n\r\n", 0, MAX_HEADER)
            if end > 0 and not content.startswith(b"\r\n"):
                self.octets = content[:end]
                self.complete = True
                return
            # A line end stands before the first line, so that an empty line ends also an empty section.
            kept = self._kept = bytearray(b"\r\n")
        start = max(0, len(kept) - 3)
        kept += content[: MAX_HEADER + 2 - len(kept)]
        end = kept.find(b"\r\n\r\n", start)
        if end >= 0:
            del kept[max(end, 2) :]
            self.end()
        elif len(kept) >= MAX_HEADER + 2:
            self.end()

    def end(self) -> None:
        """The message has ended: what was kept is all there is."""
        if not self.complete:
            self.octets = bytes(self._kept[2:]) if self._kept is not None else b""
            self._kept = None  # which may be as long again
            self.complete = True
