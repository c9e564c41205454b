"""The octets between 354 and the end of data, read by the letter of RFC 5321 4.1.1.4 and 4.5.2; no I/O.

Rules: the end of data is CRLF.CRLF and nothing else, the CRLF that ended the DATA command counting as the
first; a line begins only after CRLF. An upstream that were lenient here could not show smuggling.
"""

from __future__ import annotations

__all__ = ["ContentScanner", "stuff", "unstuff"]

_END = b"\r\n.\r\n"


class ContentScanner:
    """Finds the end of data in a stream of octets that arrives in pieces."""

    def __init__(self) -> None:
        self._held = b"\r\n"  # of the DATA command, not content
        self._foreign = 2

    def feed(self, octets: bytes) -> tuple[bytes, bytes | None]:
        """Return the content octets that are sure by now and, once the end of data is seen, what follows it.

        The content keeps the CRLF of its last line; the line with the period alone is no part of it.
        """
        data = self._held + octets
        end = data.find(_END)
        if end >= 0:
            self._held = b""
            return self._own(data[: end + 2]), data[end + len(_END) :]
        keep = next(size for size in range(len(_END) - 1, -1, -1) if data.endswith(_END[:size]))
        sure = len(data) - keep
        self._held = data[sure:]
        return self._own(data[:sure]), None

    def _own(self, data: bytes) -> bytes:
        foreign = min(self._foreign, len(data))
        self._foreign -= foreign
        return data[foreign:]


def stuff(content: bytes) -> bytes:
    """Return `content` with its dots doubled at line starts; without the end of data."""
    return (b"\r\n" + content).replace(b"\r\n.", b"\r\n..")[2:]


def unstuff(wire: bytes) -> bytes:
    """Return what `wire`, the octets before the end of data, stand for."""
    return (b"\r\n" + wire).replace(b"\r\n.", b"\r\n")[2:]
