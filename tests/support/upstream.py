"""SMTP servers that play the upstream: one does what a script says, one is well-behaved, by aiosmtpd.

Rules: both listen in the test's own event loop, on a port of the system's choice, and keep what they see.
Tests wait with `wait_for`, which looks again after each event, never with a sleep. An error in a script
fails the test. The scripts' actions and what was seen are in `script` and `connection`; import them here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import aiosmtpd.smtp

from .connection import Command, Connection, Message
from .script import (
    STAGES,
    Action,
    AfterOctets,
    Close,
    Delay,
    Garbage,
    HalfReply,
    Reset,
    Script,
    Silence,
    StopReading,
)
from .wire import Wire

__all__ = [
    "CHUNKING",
    "EXTENSIONS",
    "TOO_MANY",
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
    "at_most",
]

CHUNKING = ("CHUNKING", "BINARYMIME")
"""What it offers besides, where a test asks for BDAT."""
EXTENSIONS = ("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 52428800", "DSN", "ENHANCEDSTATUSCODES")
"""What a ScriptedUpstream offers by default, besides STARTTLS and AUTH."""

_WAIT_S = 10.0
T = TypeVar("T")


TOO_MANY = b"421 4.7.0 Error: too many connections\r\n"


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
        if unknown := script.keys() - set(STAGES):
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


def at_most(
    upstream: ScriptedUpstream, count: int, reply: bytes = TOO_MANY
) -> Callable[[str, bytes, Connection], Action | None]:
    """Return what the upstream does at a stage at which it takes no more connections than `count`."""

    taken: set[Connection] = set()

    def act(stage: str, line: bytes, connection: Connection) -> Action | None:
        del stage, line
        taken.intersection_update(upstream.open_connections)
        if len(taken) >= count:
            return Close(reply)
        taken.add(connection)
        return None

    return act


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
                cast("asyncio.Transport", session.transport).abort()
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
