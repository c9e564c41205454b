"""One mail transaction, from MAIL to its outcome.

A message's way, top to bottom: `mail` takes a connection to the first upstream of its route that can be had,
and sends MAIL up as the client wrote it (where the recipient chooses, with the first one); `rcpt` and `data`
follow, pipelined where the upstream can; every reply goes back as it came. `feed` streams the content; or
`begin_chunk`, `feed_chunk` and `end_chunk` do, chunk by chunk (RFC 3030). At the end of data, which is also
the end of the last chunk, settling begins: behind the upstream's verdict `_settle` has the row written, and
behind that `_accepted` answers the client and says once, to metrics and log, what became of the message.
There is nothing by which that could be cancelled: a client that goes, a timer and a shutdown only change what
the client hears.

Rules: another upstream is tried only until one has answered MAIL, and what it says is then the answer; a 421
is none. Only `_settle` makes a row, only after a 2yz to the end of data. Once the end of data has gone up
the message is never sent again. Content that will not be finished aborts its connection. `_conclude` is
the only place where an outcome is counted and logged, once for each transaction.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

from relay import maillog
from relay.account import Account, Sender, negative_outcome
from relay.body import Body
from relay.chunks import Chunks
from relay.content import Fault
from relay.envelope import Envelope, Recipient
from relay.outcome import Outcome
from relay.records.identity import uuid7
from relay.records.journal import ROOM, line_of
from relay.records.model import Settled
from relay.reply import Reply
from relay.upstream import xforward
from relay.upstream.connection import Connection, Failure
from relay.upstream.pool import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from relay.classify import Classification, Classifier
    from relay.limits.limits import Limits
    from relay.metrics import Metrics
    from relay.pseudonyms import Pseudonyms
    from relay.records.journal import Journal
    from relay.records.recorder import Recorder
    from relay.upstream.pool import Pool
    from relay.upstream.upstreams import Route

__all__ = ["MAX_RECEIVED", "Command", "Services", "Transaction", "refused_at_mail"]

MAX_RECEIVED = 50
"""Received fields that a message may carry before it is taken to be in a loop (RFC 5321 6.3)."""

WRITE_SIZE = 16 * 1024
"""Octets of content that gather before they are written: a small message then goes up in one piece, for half
the system calls of one that is passed on segment by segment."""

MAX_AHEAD = 10
"""Recipients that a message may go up with before their replies are known: for each of those the spool keeps
a place (the RFCs have no such limit)."""

PROVEN = 5.0
"""Seconds for which a connection that has given a reply is taken to be alive. One that was idle for longer
proves it by the reply to MAIL first: until then it can be replaced, and with a whole message up it cannot."""

_XFORWARD = "xforward"

LOST = Reply.own(451, "4.2", "The upstream server closed the connection or did not answer, try again later")
SILENT = Reply.own(451, "4.2", "Silent for too long: the upstream connection was given up, try again")
NO_ROUTE = Reply.own(451, "4.4", "No upstream server takes this message now, try again later")
OTHER_ROUTE = Reply.own(452, "5.3", "This recipient takes another route: send it in a message of its own")
HELD = Reply.own(250, "1.0", "Ok")
NO_RECIPIENTS = Reply.own(554, "5.1", "No valid recipients")
NO_MAIL = Reply.own(503, "5.1", "MAIL was not accepted")
FAULTS = {
    Fault.TOO_LARGE: Reply.own(552, "3.4", "The message is larger than this relay or its upstream takes"),
    Fault.STRAY_NEWLINE: Reply.own(550, "5.2", "The message holds a bare CR or LF (RFC 5321 2.3.8)"),
    Fault.NUL: Reply.own(550, "6.0", "The message holds a NUL octet (RFC 5321 4.1.1.4)"),
}
NO_CHUNKING = Reply.own(451, "3.3", "The upstream server does not take BDAT now, try again later")
NO_PLACE = Reply.own(451, "3.0", "The relay cannot keep the record of this message now, try again later")
LOOP = Reply.own(554, "4.6", f"Mail loop: more than {MAX_RECEIVED} Received fields")


def in_doubt(task_id: UUID) -> Reply:
    """No verdict after the end of data: the client may send again, and the log has the rest under the id."""
    text = f"The upstream server did not answer: the message may have been sent, see {task_id}"
    return Reply.own(451, "4.2", text)


def internal(task_id: UUID) -> Reply:
    """An error of ours before the end of data; the log has the cause under the id."""
    return Reply.own(451, "3.0", f"Internal error, see {task_id}")


@dataclass(frozen=True, slots=True)
class Services:
    """What transactions are given to work with."""

    recorder: Recorder
    journal: Journal
    """Holds each message between its end of data and its outcome, in case that the relay is killed."""
    classifier: Classifier
    metrics: Metrics
    normalize: bool
    max_message_size: int
    settling: set[Transaction]
    """Transactions between their end of data and their outcome; a shutdown waits for them."""
    settled: asyncio.Event = field(default_factory=asyncio.Event, kw_only=True)
    """Set each time that there is none left."""
    running: set[asyncio.Task[None]]
    """Keeps the tasks of transactions alive, those that wait for a connection."""
    limits: Limits | None = None
    """Rate limits, if there are any."""
    names: Pseudonyms | None = None
    """Gives recipients their pseudonyms; None: they are kept by their addresses."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    """Here, since to ask for it costs a system call (CPython 3.11)."""

    def refusal(self) -> str | None:
        """Return why new mail must be refused now, since what becomes of it could not be kept; else None."""
        return self.recorder.refusal() or self.journal.refusal()


@dataclass(slots=True)
class Command:
    """One that goes up."""

    verb: str
    line: bytes
    answer: Callable[[Reply], None]
    recipient: Recipient | None = None
    without_auth: bytes | None = None
    """The line for an upstream without AUTH, if it is another."""


class Transaction:
    """One mail transaction."""

    # More attributes than a class can share the names of between its objects' dicts (CPython 3.11: 30).
    __slots__ = (
        "_account",
        "_answer_verdict",
        "_asked",
        "_began",
        "_broken",
        "_broken_as",
        "_client",
        "_connection",
        "_data_reply",
        "_doubted",
        "_ended_at",
        "_leasing",
        "_loop",
        "_mail_refused",
        "_mail_reply",
        "_overdue",
        "_pool",
        "_promised",
        "_queued",
        "_route",
        "_sent",
        "_services",
        "_settled_at",
        "_slot",
        "_untried",
        "_unwritten",
        "_unwritten_size",
        "_upstream_since",
        "_verdict",
        "binary",
        "body",
        "concluded",
        "envelope",
        "gathering",
        "on_burst",
        "on_flow",
        "over",
        "settling",
        "task_id",
    )

    def __init__(
        self,
        services: Services,
        route: Route,
        sender: Sender,
        reverse_path: bytes,
        client: xforward.Client | None = None,
    ) -> None:
        """Begin with nothing sent; `client` is who an upstream is told about that is to be told."""
        self.task_id = uuid7()
        self.envelope = Envelope(reverse_path)
        self.body: Body | Chunks | None = None
        """The content; set once the upstream has said 354, or the client its first BDAT."""
        self.binary = False
        """Whether MAIL announced BODY=BINARYMIME; to be set before any content comes."""
        self.over = False
        """Whether MAIL was not accepted and everything sent behind it has been answered."""
        self.settling = False
        self.concluded = False
        self.on_flow: Callable[[bool], None] = _ignore
        """Called with True when the client must stop sending content, with False when it may go on."""
        self.on_burst: Callable[[bool], None] = _ignore
        """Called with True before several replies are given at once, with False behind them."""
        self.gathering = False
        """Whether the client has sent more behind the command that is given: `flush` follows."""
        self._services = services
        self._route = route
        self._pool: Pool  # there is one as soon as the account has the upstream's name
        self._untried: tuple[Pool, ...] = ()
        self._client = client
        self._account = Account(self.task_id, sender, None, self.envelope, names=services.names)
        self._loop = services.loop
        self._began = self._asked = self._loop.time()
        self._connection: Connection | None = None
        self._leasing: asyncio.Task[None] | None = None
        self._queued: deque[Command] = deque()
        self._sent: deque[Command] = deque()
        self._upstream_since = 0.0  # the first of them went up, or content could not
        self._mail_reply: Reply | None = None
        self._mail_refused = False
        self._data_reply: Reply | None = None
        self._broken: Reply | None = None
        self._broken_as = Outcome.UNAVAILABLE
        self._unwritten: list[bytes] = []
        self._unwritten_size = 0
        self._promised = 0  # octets that the spool keeps for the row
        self._answer_verdict: Callable[[Reply], None] = _ignore
        self._ended_at = self._settled_at = 0.0  # the end of data came from the client, from the upstream
        self._verdict: Reply | Failure | None = None
        self._overdue = False
        self._slot: int | None = None  # of the journal
        self._doubted: asyncio.Future[None] | None = None  # the entry in task_in_doubt; done: it is durable

    # Commands, as the client gives them

    def mail(
        self, line: bytes, answer: Callable[[Reply], None], *, without_auth: bytes | None = None
    ) -> None:
        """Begin: lease a connection and send MAIL; `answer` gets the upstream's reply.

        Where it takes a recipient to know the upstream, MAIL is held until then, and the answer is our own.
        `without_auth` is the line for an upstream that does not offer AUTH, if `line` has an AUTH parameter.
        """
        held = self._route.by_recipient
        self._queued.append(Command("mail", line, _ignore if held else answer, without_auth=without_auth))
        if held:
            answer(HELD)
        else:
            self._set_out(self._route.pools)

    def rcpt(self, line: bytes, path: bytes, answer: Callable[[Reply], None]) -> None:
        """Send RCPT; `answer` gets the upstream's reply to this recipient."""
        recipient = Recipient(path)
        self.envelope.recipients.append(recipient)
        self._give_recipient(Command("rcpt", line, answer, recipient))

    def _give_recipient(self, command: Command) -> None:
        path = cast("Recipient", command.recipient).path
        if not self._route.by_recipient or self._broken is not None:
            self._give(command)
        elif self._chosen:
            if self._route.takes(self._pool, path):
                self._give(command)
            else:
                _refuse_recipient(command, OTHER_ROUTE)
        elif pools := self._route.pools_for(path):
            self._queued.append(command)
            self._set_out(pools)
        else:
            _refuse_recipient(command, NO_ROUTE)

    def data(self, answer: Callable[[Reply], None]) -> None:
        """Send DATA; after a 354 `body` is set and content may be fed."""
        self._give(Command("data", b"DATA\r\n", answer))

    def _give(self, command: Command) -> None:
        if self._broken is not None:
            if command.recipient is not None:
                command.recipient.reply = self._broken
            command.answer(self._broken)
            return
        if self._account.upstream is None:  # DATA, and no recipient had a route
            command.answer(NO_RECIPIENTS)
            return
        connection = self._connection
        if connection is not None and not self._queued and (connection.pipelining or not self._sent):
            self._send(connection, command)
        else:
            self._queued.append(command)
            self._pump()

    @property
    def refused(self) -> bool:
        """Whether the client has heard MAIL refused: there is no transaction to go on with."""
        return self._mail_refused and not self._route.by_recipient

    @property
    def contested(self) -> bool:
        """Whether it has a connection that is more than the client's share while others wait."""
        return self._connection is not None and self._pool.over_share(self._account.sender.client)

    # The way

    @property
    def _chosen(self) -> bool:
        return self._account.upstream is not None

    def _set_out(self, pools: tuple[Pool, ...]) -> None:
        """Begin with the first of `pools`; the others are for when it cannot be had."""
        if not pools:
            self._break(NO_ROUTE, Outcome.UNAVAILABLE)
            return
        self._pool, self._untried = pools[0], pools[1:]
        self._account.upstream = self._pool.name
        self._lease()

    def _fail_over(self, reason: str) -> bool:
        """Turn to the next upstream before one has answered MAIL; False: there is none left."""
        if not self._untried:
            return False
        before = self._pool
        self._pool, self._untried = self._untried[0], self._untried[1:]
        self._account.upstream = self._pool.name
        before.metrics.failed_over()
        if reason:
            maillog.failover(self.task_id, before.name, self._pool.name, reason)
        if self._route.by_recipient:
            self._part_from_others()
        self._asked = self._loop.time()
        self._lease()
        return True

    def _part_from_others(self) -> None:
        """Turn away recipients that may not go where the message goes now."""
        for command in tuple(self._queued):
            if command.recipient is not None and not self._route.takes(self._pool, command.recipient.path):
                self._queued.remove(command)
                _refuse_recipient(command, OTHER_ROUTE)

    # The lease

    def _lease(self, *, fresh: bool = False) -> None:
        sender = self._account.sender
        connection = None if fresh else self._pool.take(sender.client, sender.credentials)
        if connection is not None:
            self._leased(connection)
            return
        if self._pool.avoided and self._fail_over(""):  # nothing was tried: the log has said why already
            return
        self._leasing = self._loop.create_task(self._await_lease(fresh=fresh))
        self._services.running.add(self._leasing)
        self._leasing.add_done_callback(self._services.running.discard)

    async def _await_lease(self, *, fresh: bool) -> None:
        sender = self._account.sender
        pool = self._pool
        try:
            connection = await pool.acquire(sender.client, sender.credentials, fresh=fresh)
        except UnavailableError as error:
            # A library on the way may swallow the cancellation that came too late.
            if not self.concluded and not self._fail_over(str(error)):
                self._break(error.reply, Outcome.UNAVAILABLE)
        except Exception as error:  # the client must hear something, and the log why
            maillog.unforeseen("lease", self.task_id, error)
            self._break(internal(self.task_id), Outcome.UNAVAILABLE)
        else:
            if self.concluded:  # as above
                pool.release(connection, reset=False)
            else:
                self._leased(connection)

    def _leased(self, connection: Connection) -> None:
        now = self._loop.time()
        self._account.waited_s = now - self._began
        self._pool.metrics.waited(now - self._asked)
        self._connection = connection
        connection.lessee = self
        connection.transactions += 1
        if self._client is not None and self._pool.xforward:
            self._introduce(connection, self._client)
        self._pump()

    def _introduce(self, connection: Connection, client: xforward.Client) -> None:
        """Tell the upstream who the client is, before MAIL and anew each time: connections are shared."""
        line = xforward.command(connection.xforward, client, self.task_id)
        if line is not None:
            self._queued.appendleft(Command(_XFORWARD, line, _ignore))

    def flush(self) -> None:
        """No more is given now: what has gathered goes up."""
        self.gathering = False
        if self._connection is not None:
            self._connection.flush()

    def burst(self, begins: bool) -> None:
        """Several replies come at once (called by the connection)."""
        self.on_burst(begins)

    def _pump(self) -> None:
        """Send what may be sent: everything to a pipelining upstream, else one command at a time."""
        connection = self._connection
        while connection is not None and self._queued and (connection.pipelining or not self._sent):
            self._send(connection, self._queued.popleft())

    def _send(self, connection: Connection, command: Command) -> None:
        self._await_reply_to(command)
        line = command.line
        if command.without_auth is not None and "AUTH" not in connection.capabilities:
            # AUTH is offered on the relay's own account, so is its parameter (RFC 4954 5).
            line = command.without_auth
        more = self.gathering or (connection.pipelining and bool(self._queued))
        connection.send(line, command.verb, self._answered, more=more)

    def _await_reply_to(self, command: Command) -> None:
        if not self._sent:
            self._upstream_since = self._loop.time()
        self._sent.append(command)

    def _waited_for_upstream(self) -> None:
        """The upstream has given what it was waited for, or will not."""
        if self.settling:  # from then on it is the verdict
            return
        self._account.replies_s += self._loop.time() - self._upstream_since

    # Replies, as the upstream gives them

    def _answered(self, reply: Reply) -> None:
        if reply.code == 421:
            self._upstream_closes(reply)
            return
        command = self._sent.popleft()
        if not self._sent:
            self._waited_for_upstream()
        if command.recipient is not None:
            if self._mail_refused and self._route.by_recipient:
                reply = cast("Reply", self._mail_reply)  # the client has not heard it
            command.recipient.reply = reply
        elif command.verb == "mail":
            self._mail_answered(reply)
        elif command.verb == "data":
            reply = self._data_answered(reply)
        else:
            self._other_answered(command.verb, reply)
        if self._mail_refused and not self._sent:
            self._none_left()
        command.answer(reply)
        if self._queued:
            self._pump()

    def _none_left(self) -> None:
        """MAIL was refused, and all that was sent behind it has been answered."""
        self.over = self.refused and not self._queued and self.body is None
        if self._route.by_recipient:
            self._drop_lease()

    def _upstream_closes(self, reply: Reply) -> None:
        """RFC 5321 3.8: 421 ends the upstream's session. Ours with the client goes on, so it hears 451."""
        self._cut("upstream said 421")
        heard = reply.recoded(451)
        if not self.settling:
            self._go_on_without(heard)
            return
        # To what the last chunk is up behind: a chunk, or MAIL and its recipients.
        connection, self._connection = self._connection, None
        if self._mail_reply is None:  # so the upstream has no transaction, whatever came behind it
            self._lost_before_mail(connection, heard)
            self._break(heard, Outcome.UNAVAILABLE)
        else:
            command = self._sent.popleft()
            if command.recipient is not None:
                command.recipient.reply = heard
            command.answer(heard)
        self._verdict_came(Failure("upstream said 421", reply))

    def _other_answered(self, verb: str, reply: Reply) -> None:
        if verb == "bdat":
            if not reply.positive and self._data_reply is None:
                self._data_reply = reply  # later ones only follow from it (RFC 3030 2)
        elif not reply.positive and self._connection is not None:
            # Go on whatever the upstream says to XFORWARD, as Postfix does; the client has no part in it.
            self._pool.xforward_refused(self._connection, reply)

    def _mail_answered(self, reply: Reply) -> None:
        self._mail_reply = reply
        self._pool.answered()
        if reply.positive:
            return
        self._mail_refused = True
        held = self._route.by_recipient
        if held:  # MAIL was answered before: this is the answer to all that depends on it
            self._broken, self._broken_as = reply, negative_outcome(reply)
        # What a pipelining upstream has already been sent it answers itself; the rest is not sent.
        while self._queued:
            command = self._queued.popleft()
            if held and command.recipient is not None:
                command.recipient.reply = reply
            command.answer(reply if held else NO_MAIL)

    def _data_answered(self, reply: Reply) -> Reply:
        """Return what the client hears to DATA."""
        self._data_reply = reply
        if reply.code >= 400:
            return reply
        if self.envelope.anybody and not self._mail_refused:
            self.body = Body(max_size=self._max_size(), normalize=self._services.normalize)
            return reply
        # 354 although no recipient was accepted: a lone dot ends it, and nothing is sent to anybody
        # (RFC 2920 3.1). The connection is not trusted with another message.
        self._broken, self._broken_as = NO_RECIPIENTS, self._outcome_without_data()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.lessee = None
            connection.send(b".\r\n", "end_of_data", lambda _: connection.quit())
        return NO_RECIPIENTS

    def _max_size(self) -> int:
        """The smaller of the relay's and the upstream's limit, in octets; 0: none."""
        upstream = self._connection.capabilities.size if self._connection is not None else None
        own = self._services.max_message_size
        return min(own, upstream) if own and upstream else own or upstream or 0

    # Failures before the end of data

    def connection_failed(self, failure: Failure) -> None:
        """The upstream connection is gone (called by the connection)."""
        if self.settling:
            connection, self._connection = self._connection, None
            if self._mail_reply is None:
                self._lost_before_mail(connection, failure.reply or LOST)
            self._verdict_came(failure)
        else:
            self._go_on_without(LOST if failure.reply is None else failure.reply.recoded(451))

    def _go_on_without(self, reply: Reply) -> None:
        """The connection is no more: replace it unseen where that is safe, else answer `reply`."""
        connection, self._connection = self._connection, None
        if self._mail_reply is not None or connection is None:
            self._break(reply, Outcome.UNAVAILABLE)
        elif connection.reused:  # an idle one was found dead before it had accepted MAIL
            self._take_back()
            self._lease(fresh=True)
        else:
            self._lost_before_mail(connection, reply)
            self._take_back()
            if not self._fail_over(str(reply)):
                self._break(reply, Outcome.UNAVAILABLE)

    def _lost_before_mail(self, connection: Connection | None, reply: Reply) -> None:
        """Have the pool count it, unless it may only have been idle for too long."""
        if connection is not None and not connection.reused:
            self._pool.lost(f"connection lost before MAIL was answered: {reply}")

    def _take_back(self) -> None:
        """Make ready to begin again on another connection."""
        if self._sent:
            self._waited_for_upstream()
        # That one gets an introduction of its own, by what it offers.
        self._queued.extendleft(each for each in reversed(self._sent) if each.verb != _XFORWARD)
        self._sent.clear()

    def _break(self, reply: Reply, outcome: Outcome) -> None:
        """Answer everything that waits, and whatever still comes, with `reply`: there is no connection."""
        self._broken, self._broken_as = reply, outcome
        if self._sent:
            self._waited_for_upstream()
        waiting = [*self._sent, *self._queued]
        self._sent.clear()
        self._queued.clear()
        for command in waiting:
            if command.verb == "mail":
                self._mail_reply = reply
                self._mail_refused = not reply.positive
            elif command.recipient is not None:
                command.recipient.reply = reply
        self.over = self.refused and self.body is None
        for command in waiting:
            command.answer(reply)
        self.on_flow(False)

    def _cut(self, reason: str) -> None:
        if self._connection is not None:
            self._connection.lessee = None
            self._connection.abort(reason)

    # Content

    def feed(self, block: bytes) -> bytes | None:
        """Carry a block of content; return the octets behind the end of data, or None before it.

        After the end of data the caller must call `finish`.
        """
        body = cast("Body", self.body)
        content = body.feed(block)
        self._look_at(body)
        self._gather(content)
        if body.ended:
            return body.rest
        if self._unwritten_size >= WRITE_SIZE:
            self._write_content()
        return None

    def _look_at(self, body: Body | Chunks) -> None:
        """Act on what has shown itself in the content."""
        if body.header_complete and self._account.found is None:
            self._classify(body.header)
        if body.fault is not None and self._broken is None:
            self._refuse(FAULTS[body.fault])

    def _gather(self, content: bytes) -> None:
        if content:
            self._unwritten.append(content)
            self._unwritten_size += len(content)

    def pass_on(self) -> None:
        """Write what has gathered: it comes slowly, and the upstream's patience has limits too."""
        if self._unwritten:
            self._write_content()

    def _write_content(self, *end: bytes) -> None:
        """Write what has gathered, and `end` with it, in one piece."""
        gathered, self._unwritten, self._unwritten_size = self._unwritten, [], 0
        if self._connection is not None:
            self._connection.write(*gathered, *end)

    def _classify(self, header: bytes) -> None:
        self._account.found = self._services.classifier.classify(header, self.envelope.reverse_path)
        if self._account.found.received > MAX_RECEIVED:
            self._services.metrics.rejected("loop")
            self._refuse(LOOP)

    def _refuse(self, reply: Reply) -> None:
        """Give the message up by the relay's own rule: content is cut off, the client hears at the end."""
        self._cut("content refused")
        self._connection = None
        self._unwritten, self._unwritten_size = [], 0
        self._break(reply, Outcome.REFUSED)

    def pause_content(self) -> None:
        """The upstream is slower than the client (called by the connection)."""
        if not self._sent:
            self._upstream_since = self._loop.time()
        self.on_flow(True)

    def resume_content(self) -> None:
        """The upstream can take more (called by the connection)."""
        if not self._sent:
            self._waited_for_upstream()
        self.on_flow(False)

    # Content in chunks

    @property
    def chunking(self) -> bool:
        """Whether the content comes by BDAT."""
        return isinstance(self.body, Chunks)

    @property
    def data_tried(self) -> bool:
        """Whether DATA was said: BDAT cannot follow it (RFC 3030 2)."""
        return self._data_reply is not None and not self.chunking

    @property
    def chunk_may_follow(self) -> bool:
        """Whether a chunk may go up before the replies to what is up have come."""
        connection = self._connection
        return self.chunking and (connection is None or connection.pipelining)

    @property
    def nobody_accepted(self) -> bool:
        """Whether there is nobody to send to: the upstream refused MAIL, or every recipient."""
        return self._broken is None and (self._mail_refused or not self.envelope.possible)

    def takes_ahead(self, octets: bytes) -> bool:
        """Whether a message of one chunk may go up before the replies to MAIL and RCPT (RFC 2920 3.1).

        Only where nothing but the upstream's replies is still to come: those commands are up, and the relay
        has nothing to say against the message, since that would answer them, too.
        """
        connection = self._connection
        if connection is None or self._queued or self._mail_refused or self._route.by_recipient:
            return False
        if not connection.pipelining or "CHUNKING" not in connection.capabilities:
            return False
        if self._data_reply is not None or not 0 < len(self.envelope.recipients) <= MAX_AHEAD:
            return False
        if connection.reused and self._began - connection.idle_since > PROVEN:
            return False
        chunk = Chunks(max_size=self._max_size(), binary=self.binary)
        chunk.begin(len(octets), last=True)
        chunk.feed(octets)
        return chunk.fault is None and octets.lower().count(b"received") <= MAX_RECEIVED

    def begin_chunk(self, size: int, *, last: bool) -> Chunks:
        """Begin a chunk of `size` octets; it is fed next, and `end_chunk` or, the last one, `finish` follows.

        The first one only when all replies before it are known, or if `takes_ahead` says so. Returns the
        content, to which it belongs.
        """
        if self.body is None:
            self.body = Chunks(max_size=self._max_size(), binary=self.binary)
            if self._connection is not None and "CHUNKING" not in self._connection.capabilities:
                self._drop_lease()
                self._break(NO_CHUNKING, Outcome.UNAVAILABLE)
        chunks = cast("Chunks", self.body)
        chunks.begin(size, last=last)
        self._gather(b"BDAT %d LAST\r\n" % size if last else b"BDAT %d\r\n" % size)
        self._look_at(chunks)
        return chunks

    def feed_chunk(self, block: bytes) -> None:
        """Carry octets of the chunk, no more than are left of it."""
        chunks = cast("Chunks", self.body)
        self._gather(chunks.feed(block))
        self._look_at(chunks)
        if chunks.left and self._unwritten_size >= WRITE_SIZE:
            self._write_content()

    def end_chunk(self, answer: Callable[[Reply], None]) -> None:
        """The chunk, not the last one, has come to its end: `answer` gets the reply to it."""
        connection = self._connection
        if self._broken is not None or connection is None:
            self._unwritten, self._unwritten_size = [], 0
            answer(self._broken or LOST)
            return
        # Only now: a reply that comes before the chunk is up answers nothing.
        self._await_reply_to(Command("bdat", b"", answer))
        connection.expect("bdat", self._answered)
        self._write_content()

    # From the end of data to the outcome

    def finish(self, answer: Callable[[Reply], None]) -> None:
        """The end of data has come from the client: send it up, and settle; `answer` gets the verdict.

        The last octet of the last chunk is the end of data as well.
        """
        self._answer_verdict = answer
        if self._sent:
            self._account.unknown = sum(each.recipient is not None for each in self._sent)
        if self._broken is None and self._connection is not None:
            self._enter_journal()
        connection = self._connection
        if self._broken is not None or connection is None:
            reply = self._broken or LOST
            self._tell(reply)
            self._conclude(self._broken_as, reply)
            return
        if self._sent:
            self._waited_for_upstream()
        self.settling = True
        self._services.settling.add(self)
        self._ended_at = self._loop.time()
        connection.expect("end_of_data", self._verdict_came)
        end = () if self.chunking else (b".\r\n",)
        self._write_content(*end)

    def _enter_journal(self) -> None:
        """Have a place kept for the row, and the message in the journal, before its end of data goes up.

        Where there is none, it is refused here.
        """
        self._take_stock()
        account, services = self._account, self._services
        line = account.line(self._found)
        octets = account.place(line)
        if services.recorder.promise(octets):
            self._promised = octets
            if len(line) > ROOM:
                line = line_of(account.doubt(self._found, ""))
            self._slot = services.journal.enter(line)
            if self._slot is not None:
                return
        services.metrics.rejected("records")
        self._refuse(NO_PLACE)

    def _leave_journal(self) -> None:
        if self._slot is not None:
            self._services.journal.free(self._slot)
            self._slot = None

    def _verdict_came(self, verdict: Reply | Failure) -> None:
        """Settle with the first verdict, behind whatever else the same octets of the upstream hold."""
        if self._verdict is None:
            self._verdict = verdict
            self._loop.call_soon(self._settle, verdict, self._connection)

    def _settle(self, verdict: Reply | Failure, connection: Connection | None) -> None:
        """Record an acceptance, answer the client, and say what became of the message.

        In callbacks, each behind what it has to await: a task for it takes 4 us a message.
        """
        self._account.upstream_s = self._loop.time() - self._ended_at
        if self.chunking and (self._broken is not None or self.nobody_accepted):
            self._went_nowhere(verdict, connection)
            return
        if isinstance(verdict, Failure):
            self._tell(in_doubt(self.task_id))
            self._doubt(verdict.reason)
            _behind(self._doubted, partial(self._conclude, Outcome.IN_DOUBT, verdict.reason))
            return
        self._connection = None
        # After DATA the transaction is over, whatever the verdict (RFC 5321 4.1.1.4); after a chunk that was
        # refused that is not certain (RFC 3030 2).
        reset = self.chunking and not verdict.positive
        self._pool.release(cast("Connection", connection), reset=reset)
        if verdict.positive:
            self._record(verdict)
            return
        if self._doubted is None:
            self._leave_journal()
        self._tell(verdict.recoded(451) if verdict.code == 421 else verdict)
        # A chunk that was refused before the last one decided it; this only follows from that.
        decisive = (self._data_reply if self.chunking else None) or verdict
        ended = None if self._doubted is None else self._end_doubt()
        _behind(ended, partial(self._conclude, negative_outcome(decisive), decisive))

    def _went_nowhere(self, verdict: Reply | Failure, connection: Connection | None) -> None:
        """End a message that went up with its recipients, none of whom was accepted: nobody can have it.

        So there is neither a row nor a doubt, whatever the upstream says to its end; one that accepts it all
        the same is not trusted with another.
        """
        self._connection = None
        said = self._broken or NO_RECIPIENTS
        if isinstance(verdict, Reply):
            leased = cast("Connection", connection)
            leased.usable = leased.usable and not verdict.positive
            self._pool.release(leased, reset=True)
            if not verdict.positive:
                said = verdict.recoded(451) if verdict.code == 421 else verdict
        if self._doubted is None:
            self._leave_journal()
        self._tell(said)
        ended = None if self._doubted is None else self._end_doubt()
        _behind(ended, partial(self._conclude, self._outcome_without_data(), self._last_reply()))

    def _record(self, verdict: Reply) -> None:
        """Have the row made durable; accepted means accepted, so no failure here may say otherwise."""
        self._settled_at = self._loop.time()
        try:
            self._take_stock()
            record = self._account.record(self._found, verdict, doubted=self._doubted is not None)
            kept = self._services.recorder.record(record)
        except Exception as error:
            # It stays in the journal: the next start shows that this message needs a look.
            self._not_kept("record", error)
            self._accepted(verdict)
        else:
            kept.add_done_callback(partial(self._recorded, verdict))

    def _recorded(self, verdict: Reply, kept: asyncio.Future[None]) -> None:
        error = kept.exception()
        if error is None:
            self._leave_journal()
        else:
            self._not_kept("record", error)
        self._accepted(verdict)

    def _accepted(self, verdict: Reply) -> None:
        """Only now may the client hear it."""
        self._account.commit_s = self._loop.time() - self._settled_at
        self._tell(verdict)
        self._conclude(Outcome.ACCEPTED, verdict)

    def _not_kept(self, what: str, error: BaseException) -> None:
        self._services.metrics.record_error()
        maillog.unforeseen(what, self.task_id, error)

    def _doubt(self, reason: str) -> None:
        """Have an entry made in task_in_doubt, once; nothing here may change what the client hears.

        Its slot in the journal guards the message until the entry is durable.
        """
        if self._doubted is not None:
            return
        try:
            self._take_stock()
            self._doubted = self._services.recorder.record(self._account.doubt(self._found, reason))
        except Exception as error:
            self._not_kept("doubt", error)
        else:
            self._doubted.add_done_callback(self._doubt_kept)

    def _doubt_kept(self, kept: asyncio.Future[None]) -> None:
        if kept.cancelled():
            return
        error = kept.exception()
        if error is None:
            self._leave_journal()
        else:
            self._not_kept("doubt", error)

    def _end_doubt(self) -> asyncio.Future[None] | None:
        """Take the entry back: the upstream has refused the message after all."""
        try:
            ended = self._services.recorder.record(Settled(self.task_id))
        except Exception as error:
            self._not_kept("doubt", error)
            return None
        ended.add_done_callback(self._doubt_ended)
        return ended

    def _doubt_ended(self, ended: asyncio.Future[None]) -> None:
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            self._not_kept("doubt", error)

    @property
    def _found(self) -> Classification:
        """What the header section said; there is one once the end of data has come."""
        return cast("Classification", self._account.found)

    def check(self, now: float) -> None:
        """Tell the client 451 if the verdict is overdue; it is still awaited, and recorded when it comes."""
        limit = self._pool.end_of_data_timeout
        if not self.settling or self._overdue or now - self._ended_at <= limit or self._verdict is not None:
            return
        reason = f"no answer to the end of data within {limit:g} s"
        if self.chunking and self.nobody_accepted:  # there is nothing to be in doubt about
            self._tell(NO_RECIPIENTS)
            self._verdict_came(Failure(reason))
            self._cut(reason)
            return
        self._overdue = True
        self._account.upstream_s = now - self._ended_at
        self._tell(in_doubt(self.task_id))
        self._doubt(reason)
        self._account.overdue(reason)

    def give_up(self) -> None:
        """Stop awaiting the verdict: the relay ends. The message is in doubt."""
        if self.settling:
            self._verdict_came(Failure("the relay stopped before the upstream answered"))
            self._cut("the relay stops")

    def _tell(self, reply: Reply) -> None:
        """Answer the client, once; a later verdict than the one it was told goes to the record alone."""
        # What the last chunk is up behind, and has no reply: it would hold up this one.
        for earlier in tuple(self._sent):
            earlier.answer(reply)
        if self._account.client_heard is None and not self._account.client_gone:
            self._account.client_heard = reply
            self._answer_verdict(reply)

    # Other ends

    def client_gone(self) -> None:
        """The client has disconnected."""
        self._account.client_gone = True
        if not self.settling:
            self.abandon()

    def silent(self) -> None:
        """The client has been silent for too long in the middle: give the connection to those who move."""
        if self._connection is not None:
            self._drop_lease()
            self._break(SILENT, Outcome.ABORTED)

    def abandon(self) -> None:
        """End without an end of data: RSET, QUIT, a new EHLO, or the client has gone."""
        if self.concluded or self.settling:
            return
        self._drop_lease()
        self._conclude(self._outcome_without_data(), self._last_reply())

    def _drop_lease(self) -> None:
        """Give the connection back, or cut it where something is unfinished on it."""
        if self._leasing is not None:
            self._leasing.cancel()
            self._leasing = None
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.lessee = None
        # Between two chunks RSET is allowed, and clears those that are up (RFC 3030 2).
        in_content = self.body.left > 0 if isinstance(self.body, Chunks) else self.body is not None
        if in_content or self._sent:
            connection.abort("transaction unfinished")
        else:
            # A refused MAIL opened nothing, but what XFORWARD said would stay in force for the next client.
            introduced = self._client is not None and self._pool.xforward
            self._pool.release(connection, reset=not self._mail_refused or introduced)

    def _last_reply(self) -> Reply | None:
        refused = self.envelope.refused
        return self._broken or self._data_reply or (refused[-1].reply if refused else self._mail_reply)

    def _outcome_without_data(self) -> Outcome:
        """Why it ended before the end of data: the first negative reply that decided it, or the client."""
        if self._broken is not None:
            return self._broken_as
        if not self._chosen and self.envelope.recipients:
            return Outcome.UNAVAILABLE
        if self._mail_reply is not None and self._mail_refused:
            return negative_outcome(self._mail_reply)
        refused = self.envelope.refused
        if refused and len(refused) == len(self.envelope.recipients):
            # Whether DATA was sent all the same, and its 554 "no valid recipients" heard, decides nothing.
            transient = any(each.reply is not None and each.reply.transient for each in refused)
            return Outcome.DEFERRED if transient else Outcome.REJECTED
        if self._data_reply is not None and self._data_reply.code >= 400:
            return negative_outcome(self._data_reply)
        return Outcome.ABORTED

    # The one place where the outcome is said

    def _conclude(self, outcome: Outcome, said: object) -> None:
        if self.concluded:
            return
        self.concluded = True
        self.settling = False
        services = self._services
        services.settling.discard(self)
        if not services.settling:
            services.settled.set()
        self._services.recorder.release(self._promised)
        self._take_stock()
        self._account.close(self._services.metrics, outcome, None if said is None else str(said))

    def _take_stock(self) -> None:
        """Bring the account up to date."""
        account = self._account
        account.total_s = self._loop.time() - self._began
        if self.body is not None:
            account.received, account.size = self.body.received, self.body.size


def refused_at_mail(metrics: Metrics, sender: Sender, reverse_path: bytes, reply: Reply) -> None:
    """Count and log a transaction that the relay's own policy refused at MAIL."""
    account = Account(uuid7(), sender, None, Envelope(reverse_path), client_heard=reply)
    account.close(metrics, Outcome.REFUSED, None)


def _refuse_recipient(command: Command, reply: Reply) -> None:
    """Answer a RCPT that goes up to no upstream."""
    cast("Recipient", command.recipient).reply = reply
    command.answer(reply)


def _behind(kept: asyncio.Future[None] | None, do: Callable[[], None]) -> None:
    """Do something as soon as an entry is durable; None: at once."""
    if kept is None:
        do()
    else:
        kept.add_done_callback(lambda _: do())


def _ignore(_: object) -> None:
    """Take no notice."""
