"""One connection to a scripted upstream: the server's half of the dialogue, and all that it saw.

Rules: strict by the octet (a command ends at CRLF only, the end of data is CRLF.CRLF only); what a client
must not do is noted in the upstream's `violations` and the dialogue goes on. Responsibility for a message
moves in the moment in which a whole 2yz reply is sent.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .content import ContentScanner, unstuff
from .script import Action, AfterOctets, Close, Delay, Garbage, HalfReply, Reset, Silence, StopReading
from .wire import GoneError, Wire

if TYPE_CHECKING:
    from .upstream import ScriptedUpstream

__all__ = ["Command", "Connection", "Message"]


@dataclass(frozen=True)
class Command:
    """A command line without CRLF, and the number of the TCP read that completed it."""

    line: bytes
    read: int

    @property
    def verb(self) -> str:
        """The first word, upper-cased."""
        return self.line.split(b" ", 1)[0].decode("latin-1").upper()


@dataclass
class Message:
    """One mail transaction from MAIL on."""

    mail: bytes
    """The MAIL command line as it came."""
    rcpts: list[bytes] = field(default_factory=list)
    """The RCPT command lines that were answered 2yz."""
    refused: list[bytes] = field(default_factory=list)
    """The RCPT command lines that were not."""
    wire: bytes = b""
    """The octets between 354 and the line with the period alone, or those of all chunks, as they came."""
    size: int = 0
    """Octets of `wire`, also where the upstream does not keep it."""
    chunks: list[int] = field(default_factory=list)
    """The size of each chunk that came whole, if the content came by BDAT."""
    failed: bool = False
    """Whether a chunk was not answered 2yz."""
    digest: Any = field(default_factory=hashlib.sha256, repr=False)
    sha256: str = ""
    """Of `wire`, hexadecimal, also where the upstream does not keep it. Set at the end of data."""
    complete: bool = False
    """Whether the end of data came."""
    reply: bytes | None = None
    """The reply to the end of data, once it was sent as a whole."""

    @property
    def accepted(self) -> bool:
        """Whether the end of data was answered 2yz: this server has taken responsibility."""
        return self.reply is not None and self.reply.startswith(b"2")

    @property
    def content(self) -> bytes:
        """The message itself: `wire`, after DATA with transparency undone (RFC 5321 4.5.2)."""
        return self.wire if self.chunks else unstuff(self.wire)

    @property
    def reverse_path(self) -> bytes:
        """What stands between `MAIL FROM:` and the parameters, angle brackets included."""
        return _path(self.mail)

    @property
    def recipients(self) -> list[bytes]:
        """The accepted forward-paths, angle brackets included."""
        return [_path(line) for line in self.rcpts]


class _EndedError(Exception):
    """The script has ended the connection."""


class Connection:
    """One client connection: what it said, and how far it is."""

    def __init__(self, upstream: ScriptedUpstream, wire: Wire, number: int) -> None:
        self._upstream = upstream
        self.wire = wire
        self.number = number
        """0 for the first connection that this upstream saw."""
        self.commands: list[Command] = []
        self.transcript: list[str] = []
        """`C: ` and `S: ` lines, for people; content is summed up."""
        self.messages: list[Message] = []
        """Every transaction of this connection, finished or not."""
        self.user: str | None = None
        """Who has logged in."""
        self.authorization = b""
        """Whom a PLAIN login asked to act as."""
        self.answers: list[bytes] = []
        """What the client said to the error that a refused token is answered with, decoded."""
        self.greeted = False
        """EHLO or HELO was answered 2yz (since STARTTLS, if there was one)."""
        self.message: Message | None = None
        """The transaction that is open."""
        self.task: asyncio.Task[None] | None = None

    @property
    def lines(self) -> list[bytes]:
        """The command lines."""
        return [command.line for command in self.commands]

    @property
    def groups(self) -> list[list[bytes]]:
        """The command lines, those that arrived in one TCP read together."""
        groups: dict[int, list[bytes]] = {}
        for command in self.commands:
            groups.setdefault(command.read, []).append(command.line)
        return list(groups.values())

    @property
    def open(self) -> bool:
        """Whether the connection is up."""
        return not self.wire.lost

    @property
    def idle(self) -> bool:
        """Whether it is up, past its EHLO and outside a transaction."""
        return self.open and self.greeted and self.message is None

    def say(self, octets: bytes) -> None:
        """Send octets that nobody asked for."""
        self.transcript.append(f"S! {octets!r}")
        self.wire.send(octets)

    def close(self) -> None:
        """Close, as a server does with an idle client."""
        self.wire.close()

    def reset(self) -> None:
        """End with RST."""
        self.wire.reset()

    # The dialogue.

    async def run(self) -> None:
        """Talk until one side ends it."""
        try:
            await self._talk()
        except (GoneError, ConnectionError, ssl.SSLError):
            self.wire.close()
        except _EndedError:
            pass
        finally:
            self._upstream.changed()

    async def _talk(self) -> None:
        upstream = self._upstream
        await self._answer("connect", b"", None)
        await self._answer("greeting", b"", upstream.greeting)
        if self.wire.waiting:  # nothing can have come since the greeting was written
            self._violation("octets before the greeting")
        while True:
            try:
                line, read = await self.wire.line()
            except ValueError as error:
                self._violation(str(error))
                self.wire.abort()
                raise _EndedError from None
            self.commands.append(Command(line, read))
            upstream.log.append(self.commands[-1])
            self.transcript.append(f"C: {_shown(line)}")
            if b"\n" in line or b"\r" in line:
                self._violation(f"bare newline in command {line!r}")
            upstream.changed()
            await self._command(self.commands[-1].verb, line)
            upstream.changed()

    async def _command(self, verb: str, line: bytes) -> None:
        if verb in ("EHLO", "HELO"):
            reply = await self._answer("EHLO", line, self._hello(verb))
            self.greeted, self.message = _positive(reply), None
        elif verb == "STARTTLS":
            await self._starttls(line)
        elif verb == "AUTH":
            await self._auth(line)
        elif verb == "MAIL":
            reply = await self._answer("MAIL", line, self._mail_reply(line))
            if _positive(reply) and self.message is None:
                self.message = Message(line)
                self.messages.append(self.message)
        elif verb == "RCPT":
            usual = b"250 2.1.5 ok\r\n" if self.message else b"503 5.5.1 MAIL first\r\n"
            reply = await self._answer("RCPT", line, usual)
            if self.message:
                (self.message.rcpts if _positive(reply) else self.message.refused).append(line)
        elif verb == "DATA":
            await self._data(line)
        elif verb == "BDAT":
            await self._bdat(line)
        elif verb == "RSET":
            await self._answer("RSET", line, b"250 2.0.0 reset\r\n")
            self.message = None
        elif verb == "NOOP":
            await self._answer("NOOP", line, b"250 2.0.0 ok\r\n")
        elif verb == "QUIT":
            await self._answer("QUIT", line, b"221 2.0.0 bye\r\n")
            self.wire.close()
            raise _EndedError
        else:
            offered = any(each.partition(" ")[0] == verb for each in self._upstream.extensions)
            usual = b"250 2.0.0 Ok\r\n" if offered else b"500 5.5.1 unknown command\r\n"
            await self._answer(verb, line, usual)

    def _hello(self, verb: str) -> bytes:
        if verb == "HELO":
            return b"250 upstream.test\r\n"
        upstream = self._upstream
        words = ["upstream.test", *upstream.extensions]
        if upstream.tls is not None and not upstream.implicit_tls and not self.wire.secured:
            words.append("STARTTLS")
        if upstream.users:
            words.append("AUTH " + " ".join(upstream.mechanisms))
        separators = ["-"] * (len(words) - 1) + [" "]
        return "".join(f"250{mark}{word}\r\n" for mark, word in zip(separators, words, strict=True)).encode()

    def _mail_reply(self, line: bytes) -> bytes:
        if not self.greeted:
            return b"503 5.5.1 EHLO first\r\n"
        if self.message:
            return b"503 5.5.1 nested MAIL\r\n"
        if self._upstream.users and self.user is None:
            return b"530 5.7.0 authentication required\r\n"
        if b" BODY=BINARYMIME" in line.upper() and "BINARYMIME" not in self._upstream.extensions:
            return b"555 5.5.4 BODY=BINARYMIME is not offered\r\n"
        return b"250 2.1.0 ok\r\n"

    async def _starttls(self, line: bytes) -> None:
        tls = self._upstream.tls
        offered = tls is not None and not self.wire.secured
        if offered and self.wire.waiting:
            self._violation("octets after STARTTLS")
        reply = await self._answer(
            "STARTTLS", line, b"220 2.0.0 go ahead\r\n" if offered else b"502 5.5.1 no TLS here\r\n"
        )
        if tls is None or reply[:3] != b"220":
            return
        try:
            await self.wire.secure(tls)
        except (GoneError, ssl.SSLError, ConnectionError) as error:
            self.transcript.append(f"*: no TLS: {error!r}")
            raise
        self.transcript.append("*: TLS")
        self.greeted, self.message, self.user = False, None, None

    async def _auth(self, line: bytes) -> None:
        plan = self._upstream.plan("AUTH", line, self)
        if plan is not None:
            if _positive(await self._act("AUTH", plan, b"535 5.7.8 no\r\n")):
                self.user = "whom the script let in"
            return
        try:
            user = await self._login(line)
        except (ValueError, IndexError):
            await self._send(b"501 5.5.2 bad AUTH\r\n")
            return
        self.user = user
        await self._send(b"235 2.7.0 welcome\r\n" if user is not None else b"535 5.7.8 wrong credentials\r\n")

    async def _login(self, line: bytes) -> str | None:
        """Run one AUTH exchange (RFC 4954) and return the user whose password was right."""
        users = self._upstream.users
        words = line.split()
        mechanism = words[1].decode("ascii").upper()
        if mechanism not in self._upstream.mechanisms:
            return None
        if mechanism == "PLAIN":
            self.authorization, name, password = (
                base64.b64decode(words[2]) if len(words) > 2 else await self._challenge(b"")
            ).split(b"\0")
        elif mechanism == "LOGIN":
            name = base64.b64decode(words[2]) if len(words) > 2 else await self._challenge(b"Username:")
            password = await self._challenge(b"Password:")
        elif mechanism in ("XOAUTH2", "OAUTHBEARER"):
            response = base64.b64decode(words[2]) if len(words) > 2 else await self._challenge(b"")
            return await self._token(mechanism, response)
        else:
            nonce = f"<{self.number}.1@upstream.test>".encode()
            name, digest = (await self._challenge(nonce)).rsplit(b" ", 1)
            secret = users.get(name.decode(), "").encode()
            right = hmac.new(secret, nonce, hashlib.md5).hexdigest().encode()
            return name.decode() if name.decode() in users and hmac.compare_digest(digest, right) else None
        return name.decode() if users.get(name.decode()) == password.decode() else None

    async def _token(self, mechanism: str, response: bytes) -> str | None:
        """Check a bearer token; a wrong one is told so before the final reply (RFC 7628 3.2.2)."""
        fields = response.split(b"\1")
        if mechanism == "XOAUTH2":
            name = fields[0].removeprefix(b"user=").decode()
        else:
            name = (
                fields[0]
                .split(b",")[1]
                .removeprefix(b"a=")
                .replace(b"=2C", b",")
                .replace(b"=3D", b"=")
                .decode()
            )
        bearer = next(field for field in fields if field.startswith(b"auth=Bearer ")).decode()
        if fields[-2:] == [b"", b""] and self._upstream.users.get(name) == bearer.removeprefix(
            "auth=Bearer "
        ):
            return name
        self.answers.append(await self._challenge(b'{"status":"invalid_token","schemes":"bearer"}'))
        return None

    async def _challenge(self, text: bytes) -> bytes:
        await self._send(b"334 " + base64.b64encode(text) + b"\r\n")
        line, _ = await self.wire.line()
        self.transcript.append("C: (credentials)")
        return base64.b64decode(line, validate=True)

    async def _data(self, line: bytes) -> None:
        message = self.message
        usual = b"354 go ahead\r\n"
        if message is not None and (message.chunks or b"BINARYMIME" in message.mail.upper()):
            self._violation("DATA after BDAT or BODY=BINARYMIME")
            usual = b"503 5.5.1 BDAT it is\r\n"
        elif message is None:
            usual = b"503 5.5.1 MAIL first\r\n"
        elif not message.rcpts:
            usual = b"554 5.5.1 no valid recipients\r\n"
        if self.wire.waiting:
            self._violation("octets after DATA, before its reply")
        reply = await self._answer("DATA", line, usual)
        if reply[:3] != b"354":
            return
        message = message or Message(b"")
        await self._body(message)
        self.transcript.append(f"C: ({message.size} octets, end of data)")
        self._finished(message)
        usual = b"250 2.0.0 accepted as %d\r\n" % len(self._upstream.messages)
        await self._answer("end_of_data", line, usual, message)

    async def _body(self, message: Message) -> None:
        """Read the content into `message`; what came before a client left is kept too."""
        plan = self._upstream.plan("body", b"", self)
        scanner = ContentScanner()
        kept = bytearray()
        rest: bytes | None = None
        try:
            while rest is None:
                if plan is not None and message.size >= (plan.count if isinstance(plan, AfterOctets) else 0):
                    action = plan.then if isinstance(plan, AfterOctets) else plan
                    plan = None
                    await self._act("body", action, b"")
                piece, rest = scanner.feed(await self.wire.octets())
                message.size += len(piece)
                message.digest.update(piece)
                if self._upstream.keep_content:
                    kept += piece
                self._upstream.changed()
        finally:
            message.wire = bytes(kept)
        self.wire.give_back(rest)
        message.sha256 = message.digest.hexdigest()

    async def _bdat(self, line: bytes) -> None:
        """Read one chunk (RFC 3030 2) and answer it; a message ends with the last one."""
        match = re.fullmatch(rb"BDAT (\d{1,20})( LAST)?", line)
        if match is None or "CHUNKING" not in self._upstream.extensions:
            self._violation(f"no BDAT that is understood here: {line!r}")
            self.wire.abort()
            raise _EndedError
        message = self.message
        usual = b"250 2.0.0 chunk taken\r\n"
        if message is None:
            usual = b"503 5.5.1 MAIL first\r\n"
        elif not message.rcpts:
            usual = b"554 5.5.1 no valid recipients\r\n"
        elif message.failed:
            usual = b"503 5.5.1 a chunk was refused\r\n"
        await self._chunk(line, int(match[1]), message or Message(b""))
        self.transcript.append(f"C: ({match[1].decode()} octets)")
        if match[2] is None or message is None or not usual.startswith(b"250"):
            reply = await self._answer("BDAT" if match[2] is None else "end_of_data", line, usual)
            if message is not None and not _positive(reply):
                message.failed = True
            if match[2] is not None:
                self.message = None
            return
        message.sha256 = message.digest.hexdigest()
        self._finished(message)
        usual = b"250 2.0.0 accepted as %d\r\n" % len(self._upstream.messages)
        await self._answer("end_of_data", line, usual, message)

    async def _chunk(self, line: bytes, size: int, message: Message) -> None:
        plan = self._upstream.plan("chunk", line, self)
        kept = bytearray()
        left = size
        try:
            while left:
                if plan is not None and size - left >= (plan.count if isinstance(plan, AfterOctets) else 0):
                    action = plan.then if isinstance(plan, AfterOctets) else plan
                    plan = None
                    await self._act("chunk", action, b"")
                octets = await self.wire.octets()
                piece, rest = octets[:left], octets[left:]
                self.wire.give_back(rest)
                left -= len(piece)
                message.size += len(piece)
                message.digest.update(piece)
                if self._upstream.keep_content:
                    kept += piece
                self._upstream.changed()
        finally:
            message.wire += kept
        message.chunks.append(size)

    def _finished(self, message: Message) -> None:
        """The end of data has come, in either way."""
        message.complete = True
        self._upstream.messages.append(message)
        self._upstream.log.append(message)
        self._upstream.changed()
        self.message = None

    # Answering.

    async def _answer(
        self, stage: str, line: bytes, usual: bytes | None, message: Message | None = None
    ) -> bytes:
        """Do what the script says at `stage`, or else reply `usual`; return the reply that counts, or b""."""
        return await self._act(stage, self._upstream.plan(stage, line, self), usual, message)

    async def _act(
        self, stage: str, action: Action | None, usual: bytes | None, message: Message | None = None
    ) -> bytes:
        match action:
            case None:
                return await self._send(usual or b"", message)
            case bytes():
                return await self._send(action, message)
            case Close(reply):
                await self._send(reply, message)
                self.wire.close()
                raise _EndedError
            case Reset(reply):
                await self._send(reply, message)
                self.wire.reset()
                raise _EndedError
            case HalfReply(octets):
                self.say(octets)
                self.wire.close()
                raise _EndedError
            case Garbage(octets):
                self.say(octets)
                return b""
            case Silence():
                self.transcript.append("S: (silent from here on)")
                await self.wire.gone()
                raise GoneError
            case Delay(until, then):
                await (until.wait() if isinstance(until, asyncio.Event) else asyncio.sleep(until))
                return await self._act(stage, then, usual, message)
            case StopReading():
                self.wire.pause()
                return b""
            case AfterOctets():
                raise TypeError("AfterOctets belongs to the stage 'body'")
        raise TypeError(f"not an action: {action!r}")

    async def _send(self, reply: bytes, message: Message | None = None) -> bytes:
        if not reply:
            return b""
        if "PIPELINING" not in self._upstream.extensions:
            await asyncio.sleep(0)  # let octets that are already here be read
            if self.wire.waiting:
                self._violation("a command sent before the reply to the one before it")
        if message is not None:
            message.reply = reply  # responsibility moves as the reply is sent, not when it arrives
        self.transcript += [f"S: {_shown(line)}" for line in reply.split(b"\r\n") if line]
        self.wire.send(reply)
        self._upstream.changed()
        return reply

    def _violation(self, text: str) -> None:
        self._upstream.violations.append(f"connection {self.number}: {text}")
        self.transcript.append(f"!: {text}")


def _positive(reply: bytes) -> bool:
    return reply.startswith(b"2")


def _path(line: bytes) -> bytes:
    """Cut the path out of a MAIL or RCPT line: to the '>' outside quotes, or to the first blank."""
    text = line.partition(b":")[2].lstrip(b" ")
    quoted = escaped = False
    for index, octet in enumerate(text):
        if escaped:
            escaped = False
        elif octet == ord("\\"):
            escaped = True
        elif octet == ord('"'):
            quoted = not quoted
        elif octet == ord(">") and not quoted:
            return text[: index + 1]
    return text.split(b" ", 1)[0]


def _shown(line: bytes) -> str:
    return line.decode("ascii", "backslashreplace")
