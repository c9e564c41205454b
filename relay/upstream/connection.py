"""One connection to an upstream: commands out, replies in, strictly in step.

Rules: every command gets exactly one reply, in order (RFC 5321 4.1, RFC 2920 3.2). Octets that arrive when
no reply is awaited, that are not a reply, or a reply of a kind that the command cannot have end the
connection. A connection that ends with content unfinished is aborted, never closed: closing would go
on sending what is buffered. Every wait has a limit, looked at by `check`, which the pool calls; no timer is
set or cancelled for a command.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from relay.reply import MAX_REPLY, USUAL_SIZE, MalformedReplyError, Reply, ReplyParser, usual

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.metrics import UpstreamMetrics
    from relay.upstream.capabilities import Capabilities

__all__ = ["Connection", "Failure", "Lessee", "Owner"]

QUIT_TIMEOUT: Final = 5.0
"""Seconds that the reply to QUIT is waited for, then the upstream's end of TLS, before it is cut."""

MAX_REFUSALS: Final = 3
"""After so many in a row a connection is not used again."""

_UNLIKE: Final = "end_of_data"
"""The command whose replies differ from each other as a rule, by what the upstream calls the message."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a connection ended before it had given all replies: a short reason, and its 421 if it sent one."""

    reason: str
    reply: Reply | None = None


class Lessee(Protocol):
    """Who has the connection on lease: the transaction."""

    def connection_failed(self, failure: Failure) -> None:
        """The connection is gone; no reply that was awaited will come."""

    def pause_content(self) -> None:
        """The upstream takes the content slower than it comes."""

    def resume_content(self) -> None:
        """The upstream can take more content."""

    def burst(self, begins: bool) -> None:
        """Several replies that came at once are given one after the other: that begins, or has ended."""


class Owner(Protocol):
    """Who owns the connection: the pool."""

    def refusals_counted(self) -> None:
        """The upstream ends the session for what it refused, to another transaction too."""

    def connection_ended(self, connection: Connection, reason: str) -> None:
        """The connection is gone."""


class Connection(asyncio.Protocol):
    """A connection that is open, greeted, secured and logged in, and speaks pipelined SMTP from here on."""

    def __init__(
        self,
        owner: Owner,
        capabilities: Capabilities,
        metrics: UpstreamMetrics,
        *,
        reply_timeout: float,
        end_of_data_timeout: float,
        identity: bytes | None = None,
    ) -> None:
        """Make the protocol for an open transport; times in seconds.

        `identity` is the keyed hash of the client's credentials that it is logged in with; None: it is not
        logged in, or as the relay's own account.
        """
        self._owner = owner
        self._replied = metrics.replied
        self._loop = asyncio.get_running_loop()
        self._parser = ReplyParser()
        self._awaited: deque[tuple[str, Callable[[Reply], None], float]] = deque()
        """The commands that are up, each with who is told of its reply, and since when."""
        self._unsent: list[bytes] = []
        self._head_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._paused_since: float | None = None
        self._left_at: float | None = None
        self._reply_timeout = reply_timeout
        self._end_of_data_timeout = end_of_data_timeout
        self.capabilities = capabilities
        self.identity = identity
        self.pipelining = "PIPELINING" in capabilities
        self.xforward = capabilities.parameters.get("XFORWARD", ())
        """The attributes that XFORWARD may tell; empty once the upstream has refused the command."""
        self.xforward_warned = False
        """Whether the log has a refusal of XFORWARD on this connection."""
        self.lessee: Lessee | None = None
        self.usable = True
        """False once anything but clean replies was seen, or the connection is gone."""
        self.refusals = 0
        """How often the upstream has said no since it last accepted a message."""
        self.misunderstood = False
        """Whether it has refused a command for its syntax, or for its place in the sequence."""
        self.refused_in = 0
        """The first transaction to which the upstream has said no; 0: to none."""
        self.opened_at = self._loop.time()
        self.idle_since = self.opened_at
        self.transactions = 0
        self.max_transactions = 0
        """After how many it is not used again; set by the pool."""
        self.leased_to: str | None = None
        """The client that has it on lease, by its name in the record; kept by the pool."""
        self.resetting = False
        """Whether the reply to a RSET is still to come, and whoever has it on lease has not said it."""
        self.reused = False
        """Whether it has been in the pool: it may have died there, and only the reply to MAIL will tell."""

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over a transport on which the handshake is done."""
        self._transport = transport
        # What the upstream does not take at once waits here, and no more is read until it has: a block. (With
        # 0, TLS takes an empty buffer for a full one until the upstream says something.)
        transport.set_write_buffer_limits(high=1)
        transport.set_protocol(self)
        transport.resume_reading()

    # Sending

    def send(
        self, line: bytes, command: str, answered: Callable[[Reply], None], *, more: bool = False
    ) -> None:
        """Send one command line, or the end of data; `answered` is called with its reply.

        `more`: another line or `flush` follows at once. uvloop's `write` is a system call, and a pipelined
        group goes up in one: without it a recipient costs a third more.
        """
        self.expect(command, answered)
        if more:
            self._unsent.append(line)
        elif self._unsent:
            self._unsent.append(line)
            self.flush()
        elif self._transport is not None:
            self._transport.write(line)

    def flush(self) -> None:
        """Write the lines behind which more was announced."""
        if self._unsent:
            lines = b"".join(self._unsent)
            self._unsent.clear()
            if self._transport is not None:
                self._transport.write(lines)

    def expect(self, command: str, answered: Callable[[Reply], None]) -> None:
        """Await one more reply: what calls for it is about to be written."""
        now = self._loop.time()
        if not self._awaited:
            self._head_since = now
        self._awaited.append((command, answered, now))

    def write(self, *content: bytes) -> None:
        """Send message content, in one piece with the lines behind which more was announced."""
        if self._unsent:
            content = (*self._unsent, *content)
            self._unsent.clear()
        if self._transport is not None:
            self._transport.writelines(content)

    def quit(self) -> None:
        """End the session politely (RFC 5321 4.1.1.10); only when nothing is unfinished."""
        self.usable = False
        if self._transport is None or self._transport.is_closing():
            return
        self.send(b"QUIT\r\n", "quit", self._left)

    def abort(self, reason: str) -> None:
        """Cut the connection; nothing that is still buffered is sent."""
        self._end(Failure(reason))

    def _left(self, _: Reply) -> None:
        # Not at once: asyncio's TLS cannot begin to close while it reads that the upstream closes too.
        self._loop.call_soon(self._close)

    def _close(self) -> None:
        if self._transport is not None:
            self._left_at = self._loop.time()
            self._transport.close()

    # Receiving

    def data_received(self, data: bytes) -> None:
        """Take replies, and hand each to the command that awaits it."""
        awaited = self._awaited
        if awaited and awaited[0][0] != _UNLIKE and len(data) <= USUAL_SIZE and not self._parser.pending:
            reply = usual(data)
            if reply is not None and self._answer(reply):
                return
        try:
            replies = self._parser.feed(data)
        except MalformedReplyError as error:
            if self._awaits_verdict:  # it stands, whatever comes behind it
                self._answer_what_fits(error.replies)
            self._end(Failure(f"out of step: {error}"))
            return
        if len(replies) > len(self._awaited) and self._ahead(replies):
            self._end(Failure("out of step: more replies than commands"))
            return
        # What waits for a reply goes up as soon as that is given: octets behind it now answer nothing.
        early = len(replies) >= len(self._awaited) and self._parser.pending
        lessee = self.lessee if len(replies) > 1 else None
        if lessee is None:
            self._give(replies)
        else:
            lessee.burst(True)
            try:
                self._give(replies)
            finally:
                lessee.burst(False)
        if early:
            self._end(Failure("out of step: octets that answer nothing"))

    def _give(self, replies: list[Reply]) -> None:
        """Hand each to the command that awaits it, as long as they fit and the connection stands."""
        for reply in replies:
            if not self._awaited:
                self._end(_unsolicited(reply))
                return
            if not self._answer(reply):
                self._end(Failure(f"out of step: {reply.code} to {self._awaited[0][0]}"))
                return
            if self._transport is None:
                return

    def _ahead(self, replies: list[Reply]) -> bool:
        """Whether the upstream answers what was not asked, so that none of it can be believed.

        A verdict on the end of data stands all the same (RFC 5321 4.2.1), and a 421 may come unasked.
        """
        surplus = len(replies) - len(self._awaited)
        if not self._awaited or self._awaits_verdict:
            return False
        return surplus > 1 or replies[-1].code != 421

    @property
    def _awaits_verdict(self) -> bool:
        """Whether the end of data is up, with nothing but chunks that are not answered before it."""
        return bool(self._awaited) and self._awaited[-1][0] == "end_of_data"

    def _answer_what_fits(self, replies: list[Reply]) -> None:
        for reply in replies:
            if not self._awaited or not self._answer(reply):
                return

    def _answer(self, reply: Reply) -> bool:
        """Hand it to the command that awaits one; False if it cannot answer that (RFC 5321 4.3.2)."""
        command, answered, since = self._awaited[0]
        code = reply.code
        if code < 400 and (code >= 300) != (command == "data"):
            return False
        self._awaited.popleft()
        self._head_since = now = self._loop.time()
        replied = self._replied.get(command)
        if replied is not None:
            replied(now - since)
        if code >= 400:
            self._refused(command, code)
        elif command == _UNLIKE:
            self.refusals = 0
        answered(reply)
        return True

    def _refused(self, command: str, code: int) -> None:
        if code == 421:
            self.usable = False
            # To MAIL it may be one message too many (and another connection gets that one).
            if command != "mail" and 0 < self.refused_in < self.transactions:
                self._owner.refusals_counted()
        elif command != "xforward":  # that goes on being said, whatever the upstream answers
            self.refusals += 1
            self.refused_in = self.refused_in or self.transactions
            if 500 <= code <= 504:
                self.misunderstood = True

    @property
    def stained(self) -> bool:
        """Whether the upstream may hold against the next message what it refused before.

        Servers count errors: Postfix answers late after ten and ends the connection after twenty, until it
        accepts a message; Exim ends it at the fourth syntax error. And where it is one of many servers behind
        an address, another one may be well (postscreen: the next connection).
        """
        return self.refusals >= MAX_REFUSALS or self.misunderstood

    def eof_received(self) -> None:
        """The upstream will send no more: what is awaited will not come."""
        self._end(Failure("closed by the upstream"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone; what the upstream had said before stands."""
        if exc is not None and self._transport is not None and (said := _unread(self._transport)):
            self.data_received(said)
        self._end(Failure(f"lost: {exc}" if exc else "closed"))

    def pause_writing(self) -> None:
        """The send buffer is full."""
        self._paused_since = self._loop.time()
        if self.lessee is not None:
            self.lessee.pause_content()

    def resume_writing(self) -> None:
        """The send buffer has drained."""
        self._paused_since = None
        if self.lessee is not None:
            self.lessee.resume_content()

    # Ending

    def check(self, now: float) -> None:
        """End the connection if a wait has lasted longer than its limit (RFC 5321 4.5.3.2)."""
        if self._awaited:
            command = self._awaited[0][0]
            if now - self._head_since > self._limit(command):
                self._end(Failure(f"no reply to {command} in time"))
                return
        if self._paused_since is not None and now - self._paused_since > self._reply_timeout:
            self._end(Failure("content not taken in time"))
        elif self._left_at is not None and now - self._left_at > QUIT_TIMEOUT:
            self._end(Failure("end of TLS not answered in time"))

    def _limit(self, command: str) -> float:
        if command == "end_of_data":
            # The client is told 451 after one such time; a late verdict is awaited for as long again.
            return 2 * self._end_of_data_timeout
        return QUIT_TIMEOUT if command == "quit" else self._reply_timeout

    def _end(self, failure: Failure) -> None:
        """Let go of the transport and tell lessee and owner, once."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        self.usable = False
        transport.abort()
        self._awaited.clear()
        lessee, self.lessee = self.lessee, None
        self._owner.connection_ended(self, failure.reason)
        if lessee is not None:
            lessee.connection_failed(failure)

    def __repr__(self) -> str:
        state = "leased" if self.lessee else "idle"
        return f"<Connection {state if self._transport else 'ended'}, {self.transactions} transactions>"


def _unread(transport: asyncio.Transport) -> bytes:
    """Return what had come before a write failed: a server that refuses content in its midst, and closes.

    The event loop reads no more then, though the socket still has it. Within TLS it can be read by nobody.
    """
    stream = transport.get_extra_info("socket")
    if stream is None or transport.get_extra_info("sslcontext") is not None:
        return b""
    try:
        return os.read(stream.fileno(), MAX_REPLY)
    except OSError:
        return b""


def _unsolicited(reply: Reply) -> Failure:
    if reply.code == 421:  # RFC 5321 3.8: the server may say so at any time before it closes
        return Failure(f"upstream said {reply}", reply)
    return Failure(f"out of step: {reply.code} that answers nothing")
