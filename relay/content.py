"""What content has in common, come it by DATA or BDAT: faults, size limit, header section. No I/O."""

from __future__ import annotations

from enum import Enum

__all__ = ["MAX_HEADER", "MAX_RECEIVED_OVERSHOOT", "Fault", "Header", "clean", "far_beyond"]

MAX_HEADER = 64 * 1024
"""Octets of the header section that are kept for classification; the rest streams past."""
MAX_RECEIVED_OVERSHOOT = 1024 * 1024
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
    return content.replace(b"\r", b"").replace(b"\n", b"\r\n") == content and b"\0" not in content


class Header:
    """The header section of a message, kept as its content passes."""

    __slots__ = ("_kept", "complete")

    def __init__(self) -> None:
        # A line end stands before the first line, so that an empty line ends also an empty header section.
        self._kept = bytearray(b"\r\n")
        self.complete = False
        """Whether the header section has passed, or as much of it as is kept."""

    @property
    def octets(self) -> bytes:
        """The header section as it went upstream, at most MAX_HEADER octets, without the empty line."""
        return bytes(self._kept[2:])

    def keep(self, content: bytes) -> None:
        """Keep of the next `content` what belongs to the header section; only as long as not `complete`."""
        kept = self._kept
        start = max(0, len(kept) - 3)
        kept += content[: MAX_HEADER + 2 - len(kept)]
        end = kept.find(b"\r\n\r\n", start)
        if end >= 0:
            del kept[max(end, 2) :]
            self.complete = True
        elif len(kept) >= MAX_HEADER + 2:
            self.complete = True

    def end(self) -> None:
        """The message has ended: what was kept is all there is."""
        self.complete = True
