"""SMTP servers that play the upstream: one does what a script says, one is well-behaved, by aiosmtpd.

Rules: strict by the octet, so that a relay's slip shows: a command ends at CRLF only, the end of data is
CRLF.CRLF only, and what a client must not do (talk before the greeting, run ahead of a server without
PIPELINING, run past DATA) lands in `violations`. Everything seen is kept. Tests wait with `wait_for`, which
looks again after each event, never with a sleep.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import aiosmtpd.smtp

from .content import ContentScanner, unstuff
from .wire import GoneError, Wire

__all__ = [
    "EXTENSIONS",
    "Action",
    "AfterOctets",
    "Close",
    "Command",
    "Connection",
    "Delay",
    "Garbage",
    "HalfReply",
    "Message",
    "RecordingUpstream",
    "Reset",
    "ScriptedUpstream",
    "Silence",
    "StopReading",
]

EXTENSIONS = ("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 52428800", "DSN", "ENHANCEDSTATUSCODES")
"""What a ScriptedUpstream offers by default, besides STARTTLS and AUTH."""

STAGES = frozenset(
    "connect greeting EHLO STARTTLS AUTH MAIL RCPT DATA body end_of_data RSET NOOP QUIT".split()  # noqa: SIM905
)
_WAIT_S = 10.0
T = TypeVar("T")


# Actions. A reply is plain bytes, sent as they are; the dialogue then goes on as its code says.


@dataclass(frozen=True)
class Close:
    """Send `reply`, if any, as a reply that counts; then close."""

    reply: bytes = b""


@dataclass(frozen=True)
class Reset:
    """Send `reply`, if any, as a reply that counts; then reset the connection (RST)."""

    reply: bytes = b""


@dataclass(frozen=True)
class Silence:
    """Say nothing, now and later; go on reading until the client leaves."""


@dataclass(frozen=True)
class Garbage:
    """Send octets that are no reply, and go on as if nothing had been asked."""

    octets: bytes = b"\x16\x03\x01 what is this\r\n"


@dataclass(frozen=True)
class HalfReply:
    """Send part of a reply, which does not count; then close."""

    octets: bytes = b"250-2.0.0 to be conti"


@dataclass(frozen=True)
class Delay:
    """Wait for an event, or for seconds, then act (None: as usual)."""

    until: asyncio.Event | float
    then: Action | None = None


@dataclass(frozen=True)
class StopReading:
    """In a body: read nothing more until the test calls `connection.wire.resume()`."""


@dataclass(frozen=True)
class AfterOctets:
    """In a body: act once `count` octets of it have been read. An action without this acts at the first."""

    count: int
    then: Action


Action = bytes | Close | Reset | Silence | Garbage | HalfReply | Delay | StopReading | AfterOctets
Plan = (
    Action
    | None
    | Sequence["Plan"]
    | Mapping[str, "Plan"]
    | Callable[[str, bytes, "Connection"], "Action | None"]
)
Script = Mapping[str, Plan]
"""Stage -> what to do there: an action; a list, one for each time the stage is reached, over all connections,
and as usual after its end; a dict from a part of the command line to a plan; a callable (stage, line,
connection). None anywhere means: as usual."""


# What was seen.


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
    """The octets after 354 and before the line with the period alone, as they came."""
    size: int = 0
    """Octets of `wire`, also where the upstream does not keep it."""
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
        """The message itself: `wire` with transparency undone (RFC 5321 4.5.2)."""
        return unstuff(self.wire)

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
        self._silent = False
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
            reply = await self._answer("MAIL", line, self._mail_reply())
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
            await self._answer(verb, line, b"500 5.5.1 unknown command\r\n")

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

    def _mail_reply(self) -> bytes:
        if not self.greeted:
            return b"503 5.5.1 EHLO first\r\n"
        if self.message:
            return b"503 5.5.1 nested MAIL\r\n"
        if self._upstream.users and self.user is None:
            return b"530 5.7.0 authentication required\r\n"
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
            await self._act("AUTH", plan, b"535 5.7.8 no\r\n")
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
            _, name, password = (
                base64.b64decode(words[2]) if len(words) > 2 else await self._challenge(b"")
            ).split(b"\0")
        elif mechanism == "LOGIN":
            name = base64.b64decode(words[2]) if len(words) > 2 else await self._challenge(b"Username:")
            password = await self._challenge(b"Password:")
        else:
            nonce = f"<{self.number}.1@upstream.test>".encode()
            name, digest = (await self._challenge(nonce)).rsplit(b" ", 1)
            secret = users.get(name.decode(), "").encode()
            right = hmac.new(secret, nonce, hashlib.md5).hexdigest().encode()
            return name.decode() if name.decode() in users and hmac.compare_digest(digest, right) else None
        return name.decode() if users.get(name.decode()) == password.decode() else None

    async def _challenge(self, text: bytes) -> bytes:
        await self._send(b"334 " + base64.b64encode(text) + b"\r\n")
        line, _ = await self.wire.line()
        self.transcript.append("C: (credentials)")
        return base64.b64decode(line, validate=True)

    async def _data(self, line: bytes) -> None:
        message = self.message
        usual = b"354 go ahead\r\n"
        if message is None:
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
        message.complete = True
        self._upstream.messages.append(message)
        self._upstream.log.append(message)
        usual = b"250 2.0.0 accepted as %d\r\n" % len(self._upstream.messages)
        self.transcript.append(f"C: ({message.size} octets, end of data)")
        self._upstream.changed()
        self.message = None
        await self._answer("end_of_data", line, usual, message)

    async def _body(self, message: Message) -> None:
        """Read the content into `message`; what came before a client left is kept too."""
        plan = self._upstream.plan("body", b"", self)
        scanner = ContentScanner()
        digest = hashlib.sha256()
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
                digest.update(piece)
                if self._upstream.keep_content:
                    kept += piece
                self._upstream.changed()
        finally:
            message.wire = bytes(kept)
        self.wire.give_back(rest)
        message.sha256 = digest.hexdigest()

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


class ScriptedUpstream:
    """An SMTP server on 127.0.0.1, port of the system's choice, that follows a script.

    `extensions`: EHLO keywords; leave PIPELINING out and a client that runs ahead is a violation.
    `tls`: a server's context: STARTTLS is offered, or TLS from the first octet with `implicit_tls`.
    `users`: name -> password: AUTH is offered with `mechanisms` and asked for. `keep_content` False keeps
    size and digest of messages only. All attributes may be changed while it runs.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        extensions: Sequence[str] = EXTENSIONS,
        greeting: bytes = b"220 upstream.test ESMTP\r\n",
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        users: Mapping[str, str] | None = None,
        mechanisms: Sequence[str] = ("PLAIN", "LOGIN", "CRAM-MD5"),
        keep_content: bool = True,
    ) -> None:
        self.extensions = list(extensions)
        self.greeting = greeting
        self.tls = tls
        self.implicit_tls = implicit_tls
        self.users = dict(users or {})
        self.mechanisms = tuple(mechanisms)
        self.keep_content = keep_content
        self.connections: list[Connection] = []
        self.messages: list[Message] = []
        """Messages whose end of data came, in that order, accepted or not."""
        self.log: list[Command | Message] = []
        """Commands and messages of all connections in the order in which they came."""
        self.violations: list[str] = []
        """What a client did that it must not."""
        self.port = 0
        self._script: Script = {}
        self._turns: dict[int, int] = {}
        self._waiters: set[asyncio.Event] = set()
        self._server: asyncio.Server | None = None
        self.script = script or {}

    @property
    def script(self) -> Script:
        """What to do at which stage; set it to start a new script."""
        return self._script

    @script.setter
    def script(self, script: Script) -> None:
        if unknown := script.keys() - STAGES:
            raise ValueError(f"no such stage: {', '.join(sorted(unknown))}")
        self._script = dict(script)
        self._turns = {}

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def accepted(self) -> list[Message]:
        """The messages that were answered 2yz."""
        return [message for message in self.messages if message.accepted]

    @property
    def incomplete(self) -> list[Message]:
        """Transactions that never saw their end of data, the open ones included."""
        return [m for connection in self.connections for m in connection.messages if not m.complete]

    @property
    def open_connections(self) -> list[Connection]:
        """The connections that are up now."""
        return [connection for connection in self.connections if connection.open]

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failures = await self._stop()
        if failures and error is None:
            raise failures[0]

    async def listen(self) -> None:
        """Start listening, after `unlisten` on the same port again."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Wire(self._started, self.changed),
            "127.0.0.1",
            self.port,
            ssl=self.tls if self.implicit_tls else None,
            backlog=1024,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def unlisten(self) -> None:
        """Refuse new connections; those that are open go on."""
        assert self._server is not None
        self._server.close()

    async def wait_for(self, predicate: Callable[[], T], timeout_s: float = _WAIT_S) -> T:
        """Return what `predicate` says as soon as it is true; give the transcript if that takes too long."""
        event = asyncio.Event()
        self._waiters.add(event)
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := predicate()):
                    event.clear()
                    await event.wait()
                return found
        except TimeoutError:
            raise AssertionError(f"the upstream waited in vain; it saw\n{self.transcript()}") from None
        finally:
            self._waiters.discard(event)

    async def message(self, number: int = 0, timeout_s: float = _WAIT_S) -> Message:
        """Return the message with this index, once it is there."""
        await self.wait_for(lambda: len(self.messages) > number, timeout_s)
        return self.messages[number]

    def transcript(self) -> str:
        """All connections, for people."""
        return "\n".join(
            f"connection {connection.number} ({'open' if connection.open else 'over'})\n  "
            + "\n  ".join(connection.transcript)
            for connection in self.connections
        )

    def changed(self) -> None:
        """Something has happened: whoever waits looks again."""
        for event in self._waiters:
            event.set()

    def plan(self, stage: str, line: bytes, connection: Connection) -> Action | None:
        """Return what the script wants at `stage`, None for the usual."""
        plan = self._script.get(stage)
        while not isinstance(plan, Action | None):
            if isinstance(plan, Mapping):
                plan = next((value for key, value in plan.items() if key.encode() in line), None)
            elif callable(plan):
                plan = plan(stage, line, connection)
            else:
                turn = self._turns.get(id(plan), 0)
                self._turns[id(plan)] = turn + 1
                plan = plan[turn] if turn < len(plan) else None
        return plan

    def _started(self, wire: Wire) -> None:
        connection = Connection(self, wire, len(self.connections))
        self.connections.append(connection)
        connection.task = asyncio.create_task(connection.run())

    async def _stop(self) -> list[BaseException]:
        self.unlisten()
        tasks = [connection.task for connection in self.connections if connection.task]
        # One round, so that a dialogue whose client has just left sees it and ends by itself.
        await asyncio.sleep(0)
        for connection in self.connections:
            connection.wire.abort()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        return [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)]


class RecordingUpstream:
    """A well-behaved SMTP server (aiosmtpd) on 127.0.0.1, in this event loop, that keeps what it accepts."""

    def __init__(self, **options: Any) -> None:
        self._options = {"enable_SMTPUTF8": True, "data_size_limit": 64 * 1024 * 1024, **options}
        self._sessions: list[aiosmtpd.smtp.SMTP] = []
        self._server: asyncio.Server | None = None
        self._arrived = asyncio.Condition()
        self.envelopes: list[aiosmtpd.smtp.Envelope] = []
        """One for each message: `mail_from`, `rcpt_tos`, `content` (bytes)."""
        self.port = 0

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._session, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        handlers = [session._handler_coroutine for session in self._sessions]
        for session in self._sessions:
            if session.transport is not None:
                session.transport.abort()
        await asyncio.gather(*(task for task in handlers if task is not None), return_exceptions=True)

    async def message(self, number: int = 0, timeout_s: float = _WAIT_S) -> aiosmtpd.smtp.Envelope:
        """Return the envelope with this index, once it is there."""
        async with asyncio.timeout(timeout_s), self._arrived:
            await self._arrived.wait_for(lambda: len(self.envelopes) > number)
        return self.envelopes[number]

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self,
        server: aiosmtpd.smtp.SMTP,
        session: aiosmtpd.smtp.Session,
        envelope: aiosmtpd.smtp.Envelope,
    ) -> str:
        """Keep the message; aiosmtpd calls this."""
        async with self._arrived:
            self.envelopes.append(envelope)
            self._arrived.notify_all()
        return f"250 2.0.0 accepted as {len(self.envelopes)}"

    def _session(self) -> aiosmtpd.smtp.SMTP:
        session = aiosmtpd.smtp.SMTP(self, hostname="upstream.test", **self._options)
        self._sessions.append(session)
        return session


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
