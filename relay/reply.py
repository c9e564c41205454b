"""One SMTP reply as a value, and the parser that takes replies off the wire.

Rules: nothing here does I/O. A reply that came from an upstream is parsed strictly (RFC 5321 4.2):
three digits, the first 2 to 5, one code on all lines, CRLF, bounded. What goes on to a client is printable
ASCII. The class digit of an enhanced status code (RFC 3463) is derived from the code, so the two
cannot disagree.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

__all__ = ["MAX_LINE", "MAX_REPLY", "USUAL_SIZE", "MalformedReplyError", "Reply", "ReplyParser", "usual"]

MAX_LINE: Final = 4096
"""Octets in one reply line. RFC 5321 4.5.3.1.5 asks for 512; real servers write more."""
MAX_REPLY: Final = 64 * 1024
"""Octets in one reply, all its lines together."""
USUAL_SIZE: Final = 128
"""Octets of a reply that `usual` takes."""

_LINE: Final = re.compile(rb"([2-5][0-9][0-9])(?:([ -])([^\r\n\0]*))?\r\n")
_WHOLE: Final = re.compile(rb"([2-5][0-9][0-9]) [\t\x20-\x7e]*\r\n")
_UNFINISHED: Final = re.compile(rb"(?:[2-5](?:[0-9](?:[0-9](?:[ -][^\r\n\0]*)?)?)?)?\r?\Z")
_PRINTABLE: Final = bytes(
    octet if 0x20 <= octet < 0x7F or octet in b"\t\r\n" else 0x3F for octet in range(256)
)


class MalformedReplyError(ValueError):
    """The upstream sent octets that are not a reply (RFC 5321 4.2).

    `replies` are those that were complete before them in the same octets.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.replies: list[Reply] = []


class Reply:
    """One SMTP reply.

    `code` is the three-digit code; `wire` the octets as they go to a client: every line, CRLF included.
    """

    __slots__ = ("_text", "code", "positive", "wire")

    def __init__(self, code: int, wire: bytes) -> None:
        self.code = code
        self.wire = wire
        self._text: str | None = None
        self.positive = code < 300
        """Positive completion (2yz)."""

    @classmethod
    def own(cls, code: int, detail: str, text: str) -> Reply:
        """Make a reply of the relay's own, one line.

        `detail` is the enhanced code without its class, "4.1" for 4.4.1; the class comes from `code`.
        """
        line = f"{code} {code // 100}.{detail} {text}\r\n".encode("ascii", "replace")
        return cls(code, line.translate(_PRINTABLE))

    @classmethod
    def plain(cls, code: int, *lines: str) -> Reply:
        """Make a reply that carries no enhanced code (greeting, EHLO, 354: RFC 2034 section 4)."""
        last = len(lines) - 1
        wire = "".join(f"{code}{' ' if index == last else '-'}{line}\r\n" for index, line in enumerate(lines))
        return cls(code, wire.encode("ascii", "replace").translate(_PRINTABLE))

    def recoded(self, code: int) -> Reply:
        """Return this reply under another code of the same class, text and enhanced code unchanged."""
        lines = self.wire.split(b"\r\n")[:-1]
        return Reply(code, b"".join(b"%d%s\r\n" % (code, line[3:]) for line in lines))

    def brief(self) -> Reply:
        """Return this reply, or the first lines of one that is longer than a line may be.

        For keeping: a message may have a thousand of them, one for each recipient.
        """
        if len(self.wire) <= MAX_LINE:
            return self
        lines: list[bytes] = []
        size = 0
        for line in self.wire.split(b"\r\n"):
            size += len(line) + 2
            if lines and size > MAX_LINE:
                break
            lines.append(line + b"\r\n")
        lines[-1] = b"%b %b ...\r\n" % (lines[-1][:3], lines[-1][4:-2])
        return Reply(self.code, b"".join(lines))

    @property
    def transient(self) -> bool:
        """Transient negative completion (4yz)."""
        return 400 <= self.code < 500

    @property
    def lines(self) -> list[str]:
        """The text lines without code, separator and CRLF; an enhanced code stays part of its line."""
        return [line[4:].decode("ascii") for line in self.wire.split(b"\r\n")[:-1]]

    def __str__(self) -> str:
        """The reply as one text for log and record: the code, then its lines joined by a newline."""
        text = self._text
        if text is None:  # the verdict is asked three times: for the record, and twice for the log
            one = self.wire.count(b"\n") == 1
            text = self.wire[:-2].decode("ascii") if one else f"{self.code} " + "\n".join(self.lines)
            self._text = text
        return text

    def __repr__(self) -> str:
        return f"<Reply {self.wire!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reply) and self.wire == other.wire

    def __hash__(self) -> int:
        return hash(self.wire)


@lru_cache(maxsize=64)
def usual(octets: bytes) -> Reply | None:
    """Return what comes nearly always, one printable line, as a reply; None: the parser must look at it.

    At most USUAL_SIZE octets. Servers say the same to each MAIL, RCPT and DATA, and to look it up takes a
    seventh of what parsing takes.
    """
    whole = _WHOLE.fullmatch(octets)
    return Reply(int(whole[1]), octets) if whole is not None else None


class ReplyParser:
    """Takes the octets that an upstream sends and gives back whole replies, in order."""

    __slots__ = ("_code", "_lines", "_rest", "_size", "pending")

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []
        self._code = b""
        self._size = 0
        self.pending = False
        """Whether part of a reply has arrived and its end has not."""

    def feed(self, octets: bytes) -> list[Reply]:
        """Return the replies that `octets` complete; raise MalformedReplyError at the first bad octet.

        An upstream that is out of step is not believed about the step before either: replies that were
        complete before the bad octet in the same call are lost to all but a caller who asks the error.
        """
        data = self._rest + octets if self._rest else octets
        replies: list[Reply] = []
        try:
            self._take(data, replies)
        except MalformedReplyError as error:
            error.replies = replies
            raise
        return replies

    def _take(self, data: bytes, replies: list[Reply]) -> None:
        position = 0
        while True:
            whole = None if self._lines else _WHOLE.match(data, position)
            if whole is not None and whole.end() - position <= MAX_LINE:  # nearly always
                line = whole[0]
                reply = Reply(int(whole[1]), line)
                replies.append(reply)
                position = whole.end()
                # The same to each RCPT of a group: not parsed again.
                while position < len(data) and data.startswith(line, position):
                    replies.append(reply)
                    position += len(line)
                continue
            match = _LINE.match(data, position)
            if match is None:
                break
            ended = self._line(match)
            if ended is not None:
                replies.append(ended)
            position = match.end()
        self._rest = data[position:]
        self.pending = bool(self._rest or self._lines)
        if self._rest:
            self._check_unfinished()

    def _line(self, match: re.Match[bytes]) -> Reply | None:
        code, separator, _ = match.groups()
        line = match[0]
        self._size += len(line)
        if len(line) > MAX_LINE or self._size > MAX_REPLY:
            raise MalformedReplyError("reply too long")
        if self._lines and code != self._code:
            raise MalformedReplyError("one reply with two codes")
        if separator is None:  # "250<CRLF>" is allowed (RFC 5321 4.2); the client gets the usual form
            line = code + b" \r\n"
        if separator == b"-":
            self._lines.append(line)
            self._code = code
            return None
        wire = line if not self._lines else b"".join((*self._lines, line))
        self._lines.clear()
        self._size = 0
        return Reply(int(code), wire.translate(_PRINTABLE))

    def _check_unfinished(self) -> None:
        rest = self._rest
        if len(rest) > MAX_LINE or self._size + len(rest) > MAX_REPLY:
            raise MalformedReplyError("reply too long")
        if not _UNFINISHED.match(rest):
            raise MalformedReplyError(f"not a reply: {rest[:80]!r}")
