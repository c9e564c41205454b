"""A raw SMTP client: it sends the octets that a test names and reads replies; every wait has a deadline.

Rules: it adds nothing, checks nothing and repairs nothing. A wait that passes its deadline fails the test.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from .content import stuff
from .wire import GoneError, Wire

__all__ = ["Client", "OverdueError", "Reply", "bdat", "left_open"]

DEADLINE_S = 10.0


class OverdueError(AssertionError):
    """A wait has passed its deadline."""


@dataclass(frozen=True)
class Reply:
    """One reply as it came: its code, its lines' texts, its octets."""

    code: int
    lines: tuple[str, ...]
    raw: bytes

    @property
    def text(self) -> str:
        """The lines' texts, one below the other."""
        return "\n".join(self.lines)

    def __str__(self) -> str:
        return self.raw.decode("ascii", "backslashreplace").rstrip()


_opened: list[Wire] = []  # by any client, since `left_open` was asked last


class Client:
    """One connection to an SMTP server on 127.0.0.1.

    `async with Client(port) as client:` connects and, at the end, aborts what is still open. The greeting
    is not read: `greeting()` or `ehlo()` does.
    """

    def __init__(
        self, port: int, *, host: str = "127.0.0.1", source: str = "", deadline_s: float = DEADLINE_S
    ) -> None:
        """`source`: the loopback address to come from."""
        self.host = host
        self._source = (source, 0) if source else None
        self.port = port
        self.deadline_s = deadline_s
        self.extensions: dict[str, str] = {}
        """EHLO keyword, upper-cased -> its parameters, from the last `ehlo()`."""
        self._greeted = False
        self.wire = Wire()
        """The connection, for what has no method here: `pause`, `resume`, `abort`."""

    @classmethod
    async def connect(
        cls, port: int, *, tls: ssl.SSLContext | None = None, deadline_s: float | None = None
    ) -> Self:
        """Connect, with TLS from the first octet if a context is given."""
        client = cls(port, deadline_s=DEADLINE_S if deadline_s is None else deadline_s)
        await client._open(tls)
        return client

    async def __aenter__(self) -> Self:
        await self._open(None)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wire.abort()
        await self.wire.ended()

    @property
    def address(self) -> str:
        """This end's ADDRESS:PORT."""
        return self.wire.local_address

    async def send(self, octets: bytes) -> None:
        """Write octets and wait until the buffers have room again."""
        self.wire.send(octets)
        async with self._deadline("the server does not read"):
            await self.wire.drain()

    def send_unread(self, octets: bytes) -> None:
        """Write octets without waiting for room, for a server that does not read."""
        self.wire.send(octets)

    async def reply(self) -> Reply:
        """Read one reply. ConnectionError: the server has closed instead; ValueError: it is no reply."""
        raw = b""
        lines = []
        while True:
            async with self._deadline(f"no reply, only {raw!r},"):
                try:
                    line, _ = await self.wire.line()
                except GoneError:
                    raise ConnectionError(f"closed after {raw + self.wire.discard()!r}") from None
            raw += line + b"\r\n"
            if not line[:3].isdigit() or line[3:4] not in (b" ", b"-"):
                raise ValueError(f"not a reply: {raw!r}")
            if line[:3] != raw[:3]:
                raise ValueError(f"one reply, two codes: {raw!r}")
            lines.append(line[4:].decode("ascii"))
            if line[3:4] == b" ":
                return Reply(int(line[:3]), tuple(lines), raw)

    async def replies(self, count: int) -> list[Reply]:
        """Read `count` replies."""
        return [await self.reply() for _ in range(count)]

    async def expect(self, code: int) -> Reply:
        """Read one reply and fail unless it has this code."""
        reply = await self.reply()
        assert reply.code == code, f"expected {code}, got {reply}"
        return reply

    async def command(self, line: bytes | str, code: int | None = None) -> Reply:
        """Send one command line (CRLF is added) and read its reply; with `code`, expect that one."""
        await self.send((line.encode() if isinstance(line, str) else line) + b"\r\n")
        return await (self.reply() if code is None else self.expect(code))

    async def greeting(self) -> Reply:
        """Read the greeting, a 220."""
        self._greeted = True
        return await self.expect(220)

    async def ehlo(self, name: str = "client.test") -> Reply:
        """Read the greeting if it is still to come, say EHLO, note the extensions."""
        if not self._greeted:
            await self.greeting()
        reply = await self.command(f"EHLO {name}", 250)
        words = (line.partition(" ") for line in reply.lines[1:])
        self.extensions = {keyword.upper(): parameters for keyword, _, parameters in words}
        return reply

    async def starttls(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        """Ask for TLS and run the handshake; say EHLO afterwards."""
        await self.command(b"STARTTLS", 220)
        async with self._deadline("no TLS handshake"):
            await self.wire.secure(context, server_name=name)

    async def message(
        self,
        sender: bytes | str,
        recipients: Sequence[bytes | str],
        content: bytes,
        *,
        pipelined: bool = False,
    ) -> list[Reply]:
        """Run one transaction and return all its replies: MAIL, each RCPT, DATA and, after a 354, the last.

        `content` is stuffed here and must end in CRLF (or be empty). `pipelined`: MAIL to DATA in one write.
        """
        commands = [b"MAIL FROM:<%b>" % _octets(sender)]
        commands += [b"RCPT TO:<%b>" % _octets(recipient) for recipient in recipients]
        commands.append(b"DATA")
        if pipelined:
            await self.send(b"".join(command + b"\r\n" for command in commands))
            replies = await self.replies(len(commands))
        else:
            replies = [await self.command(command) for command in commands]
        if replies[-1].code == 354:
            await self.send(stuff(content) + b".\r\n")
            replies.append(await self.reply())
        return replies

    async def chunks(
        self, sender: bytes | str, recipients: Sequence[bytes | str], chunks: Sequence[bytes]
    ) -> list[Reply]:
        """Run one transaction by BDAT, in one write; return all its replies. The last chunk is LAST."""
        commands = [b"MAIL FROM:<%b>\r\n" % _octets(sender)]
        commands += [b"RCPT TO:<%b>\r\n" % _octets(recipient) for recipient in recipients]
        commands += [bdat(chunk) for chunk in chunks[:-1]] + [bdat(chunks[-1], last=True)]
        await self.send(b"".join(commands))
        return await self.replies(len(commands))

    async def quit(self) -> None:
        """Say QUIT, expect 221 and the end of the connection, then end it on this side, too."""
        await self.command(b"QUIT", 221)
        await self.expect_eof()
        await self.__aexit__()

    async def expect_eof(self) -> None:
        """Fail unless the server closes now (FIN or RST), with nothing more said."""
        rest = await self.expect_closed()
        assert rest == b"", f"instead of the end: {rest!r}"

    async def expect_closed(self) -> bytes:
        """Return what the server still says before it closes or resets the connection."""
        said = b""
        async with self._deadline("the server does not close"):
            while True:
                try:
                    said += await self.wire.octets()
                except GoneError:
                    return said

    def half_close(self) -> None:
        """Send FIN; replies can still be read."""
        self.wire.half_close()

    def reset(self) -> None:
        """End the connection with RST."""
        self.wire.reset()

    def close(self) -> None:
        """Close without a word."""
        self.wire.close()

    async def _open(self, tls: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        async with self._deadline("no connection"):
            await loop.create_connection(
                lambda: self.wire,
                self.host,
                self.port,
                ssl=tls,
                server_hostname="localhost" if tls else None,
                local_addr=self._source,
            )
        _opened.append(self.wire)
        if self.wire.meets_itself:
            self.wire.abort()
            raise ConnectionRefusedError("nobody listens there: the connection is one with itself")

    def _deadline(self, complaint: str) -> _Deadline:
        return _Deadline(self.deadline_s, complaint)


class _Deadline:
    """`asyncio.timeout` whose end is a failed test that says what was waited for."""

    def __init__(self, seconds: float, complaint: str) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._complaint = f"{complaint} within {seconds:g} s"

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        try:
            await self._timeout.__aexit__(*error)  # type: ignore[arg-type]
        except TimeoutError:
            raise OverdueError(self._complaint) from None


def left_open() -> list[Wire]:
    """Return the connections that are not over, of all that were opened since the last call.

    One that a test leaves to the garbage collector would be the failure of another test, some time later.
    """
    left = [wire for wire in _opened if not wire.lost]
    _opened.clear()
    return left


def bdat(chunk: bytes, *, last: bool = False) -> bytes:
    """Return a BDAT command and its chunk (RFC 3030 2)."""
    return b"BDAT %d%b\r\n%b" % (len(chunk), b" LAST" if last else b"", chunk)


def _octets(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
