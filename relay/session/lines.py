"""Command lines out of the octets that a client sends. No I/O.

Rules: a line ends with CRLF and with nothing else (RFC 5321 2.3.8). A bare CR or LF, or a line that does not
end, is out of step at once, however TCP cut the octets: a lenient reader would let one side see two
commands where the other sees one. The octets are walked by offset, not copied line by line.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["MAX_AUTH_LINE", "MAX_LINE", "USUAL", "EndlessLineError", "Lines", "NotCrlfError"]

MAX_LINE: Final = 2048
"""Octets after which a line without end is no command line, whatever follows."""
MAX_AUTH_LINE: Final = 12288
"""Octets of AUTH and of the lines of its exchange, CRLF included (RFC 4954 section 4)."""


USUAL: Final = re.compile(rb"([A-Za-z]{4}+)(?: ([ -~]{0,505}+))?\r\n")
"""A line such as nearly all are, its verb and its argument: four letters, printable ASCII, no longer than any
may be (RFC 5321 4.5.3.1.4). Nothing of what makes a line wrong in itself is left to look at.
"""


class NotCrlfError(Exception):
    """A bare CR or LF stands in a command line."""


class EndlessLineError(Exception):
    """More octets than a line may have came without its end."""


class Lines:
    """Input that waits, and the lines in it."""

    __slots__ = ("_at", "_before", "_octets", "size")

    def __init__(self) -> None:
        self._octets = b""
        self._at = 0
        self._before = 0
        self.size = 0
        """Octets that wait."""

    def feed(self, octets: bytes) -> None:
        """Take input."""
        self._octets = self._octets[self._at :] + octets if self.size else octets
        self._at = 0
        self.size = len(self._octets)

    def usual(self) -> re.Match[bytes] | None:
        """Return the next line if it is such as nearly all are; else None, and `next` is to look."""
        found = USUAL.match(self._octets, self._at)
        if found is not None:
            self._before, self._at = self._at, found.end()
            self.size = len(self._octets) - self._at
        return found

    def next(self, *, exchange: bool = False) -> bytes | None:
        """Return the next line without its CRLF, or None as long as it is not complete.

        Raises NotCrlfError or EndlessLineError; there is no going on after either. `exchange`: the line is
        part of an AUTH exchange.
        """
        end = self._octets.find(b"\r\n", self._at)
        line = self._octets[self._at : end] if end >= 0 else self._octets[self._at :].removesuffix(b"\r")
        if b"\n" in line or b"\r" in line:
            raise NotCrlfError
        if len(line) > MAX_LINE and (len(line) + 2 > MAX_AUTH_LINE or not (exchange or _is_auth(line))):
            raise EndlessLineError
        if end < 0:
            return None
        self._before, self._at = self._at, end + 2
        self.size = len(self._octets) - self._at
        return line

    def back(self) -> None:
        """Put the line that was returned last back: it has to wait."""
        self._at = self._before
        self.size = len(self._octets) - self._at

    def take(self, limit: int | None = None) -> bytes:
        """Return the input that waits, at most `limit` octets of it, as it is: content, not lines."""
        if limit is not None and limit < self.size:
            octets = self._octets[self._at : self._at + limit]
            self._at += limit
            self.size -= limit
            return octets
        octets = self._octets[self._at :] if self._at else self._octets
        self.clear()
        return octets

    def peek(self, count: int) -> bytes:
        """Return the next `count` octets, or all there are; they stay."""
        return self._octets[self._at : self._at + count]

    def clear(self) -> None:
        """Forget what waits."""
        self._octets = b""
        self._at = 0
        self.size = 0


def _is_auth(line: bytes) -> bool:
    return line[:5].upper() == b"AUTH "
