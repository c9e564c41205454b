"""One mail transaction, from MAIL to its end of data.

A message's way, top to bottom: `mail` takes a connection to the first upstream of its route that can be had,
and sends MAIL up as the client wrote it (where the recipient chooses, with the first one); `rcpt` and `data`
follow, pipelined where the upstream can; every reply goes back as it came. `feed` streams the content; or
`begin_chunk`, `feed_chunk` and `end_chunk` do, chunk by chunk (RFC 3030). At the end of data, which is also
the end of the last chunk, `finish` sends it up, and leaves the message to a `Settlement`.

Where it stands, what says so, and who moves it on:

- held, as long as it has no upstream (`_chosen`): the first `rcpt` that has a route sets out;
- waiting for a connection: `_connect` asks for one, `_leased` and `_not_leased` hear of it, and the latter
  turns to the next upstream (`_fail_over`) or breaks;
- commands: each stands in `_queued` until it may go up (`_pump`), then in `_sent` until `_answered`;
- content, since there is a `body`: by the 354 (`_data_answered`) or the first `begin_chunk`;
- settling, since there is a `_settlement`: by `finish`; the verdict, and what follows, is the settlement's;
- concluded: by the settlement, by `finish` where the end of data cannot go up, or by `abandon`.

Once it is broken (`course.broken`, by `_break` as a rule) nothing goes up any more, and whatever waits or
still comes is answered with that reply.

Rules: another upstream is tried only until one has answered MAIL, and what it says is then the answer; a 421
is none. Once the end of data has gone up the message is never sent again: from then on there is a settlement,
and no way leads back. Content that will not be finished aborts its connection. `_conclude` is the only place
where an outcome is counted and logged, once for each transaction.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from relay.account import Account, Sender, negative_outcome
from relay.answers import (
    FAULTS,
    HELD,
    LOOP,
    LOST,
    MAX_RECEIVED,
    NO_CHUNKING,
    NO_MAIL,
    NO_PLACE,
    NO_RECIPIENTS,
    NO_ROUTE,
    OTHER_ROUTE,
    SILENT,
)
from relay.body import Body
from relay.chunks import Chunks
from relay.course import Course
from relay.envelope import Envelope, Recipient
from relay.lease import Lease
from relay.outcome import Outcome
from relay.records.identity import uuid7
from relay.settlement import Settlement
from relay.upstream import xforward
from relay.upstream.connection import Connection, Failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from relay.metrics import Metrics
    from relay.reply import Reply
    from relay.services import Services
    from relay.upstream.capabilities import Capabilities
    from relay.upstream.pool import Pool
    from relay.upstream.upstreams import Route

    LineFor = Callable[[Capabilities], bytes]

__all__ = ["Command", "Transaction", "refused_at_mail"]

WRITE_SIZE: Final = 16 * 1024
"""Octets of content that gather before they are written: a small message then goes up in one piece, for half
the system calls of one that is passed on segment by segment."""

MAX_AHEAD: Final = 10
"""Recipients that a message may go up with before their replies are known: for each of those the spool keeps
a place (the RFCs have no such limit)."""

PROVEN = 5.0
"""Seconds for which a connection that has given a reply is taken to be alive. One that was idle for longer
proves it by the reply to MAIL first: until then it can be replaced, and with a whole message up it cannot."""

_XFORWARD: Final = "xforward"


class Command:
    """One that goes up."""

    __slots__ = ("answer", "line", "line_for", "recipient", "verb")

    def __init__(
        self,
        verb: str,
        line: bytes,
        answer: Callable[[Reply], None],
        recipient: Recipient | None = None,
        line_for: LineFor | None = None,
    ) -> None:
        """`line_for` says what is sent to which upstream, where that is not the same for all."""
        self.verb = verb
        self.line = line
        self.answer = answer
        self.recipient = recipient
        self.line_for = line_for


class Transaction:
    """One mail transaction."""

    __slots__ = (
        "_account",
        "_client",
        "_lease",
        "_loop",
        "_queued",
        "_route",
        "_sent",
        "_services",
        "_settlement",
        "_unwritten",
        "_unwritten_size",
        "_upstream_since",
        "binary",
        "body",
        "concluded",
        "course",
        "envelope",
        "gathering",
        "on_burst",
        "on_flow",
        "over",
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
        self.envelope = Envelope(reverse_path)
        self.course = Course(self.envelope)
        self.body: Body | Chunks | None = None
        """The content; set once the upstream has said 354, or the client its first BDAT."""
        self.binary = False
        """Whether MAIL announced BODY=BINARYMIME; to be set before any content comes."""
        self.over = False
        """Whether MAIL was not accepted and everything sent behind it has been answered."""
        self.concluded = False
        self.on_flow: Callable[[bool], None] = _ignore
        """Called with True when the client must stop sending content, with False when it may go on."""
        self.on_burst: Callable[[bool], None] = _ignore
        """Called with True before several replies are given at once, with False behind them."""
        self.gathering = False
        """Whether the client has sent more behind the command that is given: `flush` follows."""
        self._services = services
        self._route = route
        self._client = client
        self._loop = services.loop
        self._account = Account(uuid7(), sender, self.envelope, self._loop.time(), services.names)
        self._lease = Lease(services, self._account)
        self._queued: deque[Command] = deque()
        self._sent: deque[Command] = deque()
        self._upstream_since = 0.0  # the first of them went up, or content could not
        self._unwritten: list[bytes] = []
        self._unwritten_size = 0
        self._settlement: Settlement | None = None  # from the end of data on, which has gone up

    @property
    def task_id(self) -> UUID:
        """By which records and log know it."""
        return self._account.task_id

    # Commands, as the client gives them

    def mail(self, line: bytes, answer: Callable[[Reply], None], *, line_for: LineFor | None = None) -> None:
        """Begin: lease a connection and send MAIL; `answer` gets the upstream's reply.

        Where it takes a recipient to know the upstream, MAIL is held until then, and the answer is our own.
        `line_for` returns the line for what an upstream can do, if `line` has parameters that the relay
        offers on its own account.
        """
        held = self._route.by_recipient
        self._queued.append(Command("mail", line, _ignore if held else answer, line_for=line_for))
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
        if not self._route.by_recipient or self.course.broken is not None:
            self._give(command)
            return
        path = cast("Recipient", command.recipient).path
        if self._chosen:
            if self._route.takes(self._lease.pool, path):
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
        if self.course.broken is not None:
            if command.recipient is not None:
                command.recipient.answered(self.course.broken)
            command.answer(self.course.broken)
            return
        if self._account.upstream is None:  # DATA, and no recipient had a route
            command.answer(NO_RECIPIENTS)
            return
        connection = self._lease.connection
        if connection is not None and not self._queued and (connection.pipelining or not self._sent):
            self._send(connection, command)
        else:
            self._queued.append(command)
            self._pump()

    @property
    def refused(self) -> bool:
        """Whether the client has heard MAIL refused: there is no transaction to go on with."""
        return self.course.mail_refused and not self._route.by_recipient

    @property
    def contested(self) -> bool:
        """Whether it has a connection that is more than the client's share while others wait."""
        return self._lease.connection is not None and self._lease.pool.over_share(self._account.sender.client)

    # The way

    @property
    def _chosen(self) -> bool:
        return self._account.upstream is not None

    def _set_out(self, pools: tuple[Pool, ...]) -> None:
        """Begin with the first of `pools`; the others are for when it cannot be had."""
        if not pools:
            self._break(NO_ROUTE, Outcome.UNAVAILABLE)
            return
        self._lease.choose(pools)
        self._connect()

    def _fail_over(self, reason: str) -> bool:
        """Turn to the next upstream before one has answered MAIL; False: there is none left."""
        if not self._lease.turn_to_next(reason):
            return False
        if self._route.by_recipient:
            self._part_from_others()
        self._connect()
        return True

    def _part_from_others(self) -> None:
        """Turn away recipients that may not go where the message goes now."""
        pool = self._lease.pool
        for command in tuple(self._queued):
            if command.recipient is not None and not self._route.takes(pool, command.recipient.path):
                self._queued.remove(command)
                _refuse_recipient(command, OTHER_ROUTE)

    def _connect(self, *, fresh: bool = False) -> None:
        """Have a connection to the upstream, at once or as soon as there is one."""
        lease = self._lease
        connection = None if fresh else lease.take()
        if connection is not None:
            self._leased(connection)
            return
        if lease.pool.avoided and self._fail_over(""):  # nothing was tried: the log has said why already
            return
        lease.wait(self._leased, self._not_leased, fresh=fresh)

    def _not_leased(self, reply: Reply, reason: str | None) -> None:
        if reason is None or not self._fail_over(reason):
            self._break(reply, Outcome.UNAVAILABLE)

    def _leased(self, connection: Connection) -> None:
        connection.lessee = self
        if self._client is not None and self._lease.pool.xforward:
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
        if self._lease.connection is not None:
            self._lease.connection.flush()

    def burst(self, begins: bool) -> None:
        """Several replies come at once (called by the connection)."""
        self.on_burst(begins)

    def _pump(self) -> None:
        """Send what may be sent: everything to a pipelining upstream, else one command at a time."""
        connection = self._lease.connection
        while connection is not None and self._queued and (connection.pipelining or not self._sent):
            self._send(connection, self._queued.popleft())

    def _send(self, connection: Connection, command: Command) -> None:
        if not self._sent:
            self._upstream_since = self._loop.time()
        self._sent.append(command)
        line = command.line
        if command.line_for is not None:
            line = command.line_for(connection.capabilities)
        more = self.gathering
        if self._queued and connection.pipelining:
            more = True
        connection.send(line, command.verb, self._answered, more=more)

    def _waited_for_upstream(self) -> None:
        """The upstream has given what it was waited for, or will not."""
        if self._settlement is not None:  # from then on it is the verdict
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
            if self.course.mail_refused and self._route.by_recipient:
                reply = cast("Reply", self.course.mail_reply)  # the client has not heard it
            command.recipient.answered(reply)
        elif command.verb == "mail":
            self._mail_answered(reply)
        elif command.verb == "data":
            reply = self._data_answered(reply)
        else:
            self._other_answered(command.verb, reply)
        if self.course.mail_refused and not self._sent:
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
        connection = self._lease.cut("upstream said 421")
        heard = reply.recoded(451)
        settlement = self._settlement
        if settlement is None:
            self._go_on_without(connection, heard)
            return
        # To what the last chunk is up behind: a chunk, or MAIL and its recipients.
        if self.course.mail_reply is None:  # so the upstream has no transaction, whatever came behind it
            self._lost_before_mail(connection, heard)
            self._break(heard, Outcome.UNAVAILABLE)
        else:
            command = self._sent.popleft()
            if command.recipient is not None:
                command.recipient.answered(heard)
            command.answer(heard)
        settlement.verdict_came(Failure("upstream said 421", reply))

    def _other_answered(self, verb: str, reply: Reply) -> None:
        if verb == "bdat":
            if not reply.positive and self.course.data_reply is None:
                self.course.data_reply = reply  # later ones only follow from it (RFC 3030 2)
        elif not reply.positive and self._lease.connection is not None:
            # Go on whatever the upstream says to XFORWARD, as Postfix does; the client has no part in it.
            self._lease.pool.xforward_refused(self._lease.connection, reply)

    def _mail_answered(self, reply: Reply) -> None:
        self.course.mail_reply = reply
        self._lease.pool.answered()
        if reply.positive:
            return
        self.course.mail_refused = True
        held = self._route.by_recipient
        if held:  # MAIL was answered before: this is the answer to all that depends on it
            self.course.broken, self.course.broken_as = reply, negative_outcome(reply)
        # What a pipelining upstream has already been sent it answers itself; the rest is not sent.
        while self._queued:
            command = self._queued.popleft()
            if held and command.recipient is not None:
                command.recipient.answered(reply)
            command.answer(reply if held else NO_MAIL)

    def _data_answered(self, reply: Reply) -> Reply:
        """Return what the client hears to DATA."""
        self.course.data_reply = reply
        if reply.code >= 400:
            return reply
        if self.envelope.anybody and not self.course.mail_refused:
            self.body = Body(max_size=self._max_size(), normalize=self._services.normalize)
            return reply
        # 354 although no recipient was accepted: a lone dot ends it, and nothing is sent to anybody
        # (RFC 2920 3.1). The connection is not trusted with another message.
        self.course.broken, self.course.broken_as = NO_RECIPIENTS, self.course.outcome()
        connection = self._lease.part()
        if connection is not None:
            connection.send(b".\r\n", "end_of_data", lambda _: connection.quit())
        return NO_RECIPIENTS

    def _max_size(self) -> int:
        """The smaller of the relay's and the upstream's limit, in octets; 0: none."""
        upstream = self._lease.connection.capabilities.size if self._lease.connection is not None else None
        own = self._services.max_message_size
        return min(own, upstream) if own and upstream else own or upstream or 0

    # Failures before the end of data

    def connection_failed(self, failure: Failure) -> None:
        """The upstream connection is gone (called by the connection)."""
        connection, settlement = self._lease.part(), self._settlement
        if settlement is None:
            reply = LOST if failure.reply is None else failure.reply.recoded(451)
            self._go_on_without(connection, reply)
            return
        if self.course.mail_reply is None:
            self._lost_before_mail(connection, failure.reply or LOST)
        settlement.verdict_came(failure)

    def _go_on_without(self, connection: Connection | None, reply: Reply) -> None:
        """The connection is no more: replace it unseen where that is safe, else answer `reply`."""
        if self.course.mail_reply is not None or connection is None:
            self._break(reply, Outcome.UNAVAILABLE)
        elif connection.reused:  # an idle one was found dead before it had accepted MAIL
            self._take_back()
            self._connect(fresh=True)
        else:
            self._lost_before_mail(connection, reply)
            self._take_back()
            if not self._fail_over(str(reply)):
                self._break(reply, Outcome.UNAVAILABLE)

    def _lost_before_mail(self, connection: Connection | None, reply: Reply) -> None:
        """Have the pool count it, unless it may only have been idle for too long."""
        if connection is not None and not connection.reused:
            self._lease.pool.lost(f"connection lost before MAIL was answered: {reply}")

    def _take_back(self) -> None:
        """Make ready to begin again on another connection."""
        if self._sent:
            self._waited_for_upstream()
        # That one gets an introduction of its own, by what it offers.
        self._queued.extendleft(each for each in reversed(self._sent) if each.verb != _XFORWARD)
        self._sent.clear()
        self.on_flow(False)

    def _break(self, reply: Reply, outcome: Outcome) -> None:
        """Answer everything that waits, and whatever still comes, with `reply`: there is no connection."""
        self.course.broken, self.course.broken_as = reply, outcome
        if self._sent:
            self._waited_for_upstream()
        waiting = [*self._sent, *self._queued]
        self._sent.clear()
        self._queued.clear()
        for command in waiting:
            if command.verb == "mail":
                self.course.mail_reply = reply
                self.course.mail_refused = not reply.positive
            elif command.recipient is not None:
                command.recipient.answered(reply)
        self.over = self.refused and self.body is None
        for command in waiting:
            command.answer(reply)
        self.on_flow(False)

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
        if body.fault is not None and self.course.broken is None:
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
        if self._lease.connection is not None:
            self._lease.connection.write(*gathered, *end)

    def _classify(self, header: bytes) -> None:
        self._account.found = self._services.classifier.classify(header, self.envelope.reverse_path)
        if self._account.found.received > MAX_RECEIVED:
            self._services.metrics.rejected("loop")
            self._refuse(LOOP)

    def _refuse(self, reply: Reply) -> None:
        """Give the message up by the relay's own rule: content is cut off, the client hears at the end."""
        self._lease.cut("content refused")
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
        return self.course.data_reply is not None and not self.chunking

    @property
    def chunk_may_follow(self) -> bool:
        """Whether a chunk may go up before the replies to what is up have come."""
        connection = self._lease.connection
        return self.chunking and (connection is None or connection.pipelining)

    @property
    def _takes_chunks(self) -> bool:
        """Whether the content may come by BDAT: not every connection of an upstream is to the same server."""
        connection = self._lease.connection
        return connection is None or "CHUNKING" in connection.capabilities

    def takes_ahead(self, octets: bytes) -> bool:
        """Whether a message of one chunk may go up before the replies to MAIL and RCPT (RFC 2920 3.1).

        Only where nothing but the upstream's replies is still to come: those commands are up, and the relay
        has nothing to say against the message, since that would answer them, too.
        """
        connection = self._lease.connection
        if connection is None or self._queued or self.course.mail_refused or self._route.by_recipient:
            return False
        if not connection.pipelining or "CHUNKING" not in connection.capabilities:
            return False
        if self.course.data_reply is not None or not 0 < len(self.envelope.recipients) <= MAX_AHEAD:
            return False
        if connection.reused and self._account.began - connection.idle_since > PROVEN:
            return False
        if connection.resetting:  # refused, the connection is given up
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
            if self.course.broken is None and not self._takes_chunks:
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
        connection = self._lease.connection
        if self.course.broken is not None or connection is None:
            self._unwritten, self._unwritten_size = [], 0
            answer(self.course.broken or LOST)
            return
        # Only now: a reply that comes before the chunk is up answers nothing.
        if not self._sent:
            self._upstream_since = self._loop.time()
        self._sent.append(Command("bdat", b"", answer))
        connection.expect("bdat", self._answered)
        self._write_content()

    # The end of data

    def finish(self, answer: Callable[[Reply], None]) -> None:
        """The end of data has come from the client: send it up, and settle; `answer` gets the verdict.

        The last octet of the last chunk is the end of data as well.
        """
        self._take_stock()
        if self._sent:
            self._account.unknown = sum(each.recipient is not None for each in self._sent)
            answer = partial(self._answer_behind, answer)
        connection, course = self._lease.connection, self.course
        if course.broken is not None or connection is None:
            self._end_unsent(answer)
            return
        chunked = isinstance(self.body, Chunks)
        settlement = Settlement(
            self._services,
            self._account,
            self._lease,
            course,
            chunked=chunked,
            answer=answer,
            conclude=self._conclude,
        )
        if not settlement.begin():
            self._refuse(NO_PLACE)
            self._end_unsent(answer)
            return
        if self._sent:
            self._waited_for_upstream()
        self._settlement = settlement
        self.on_flow = _ignore  # no more comes of this one, and the next goes over another connection
        connection.expect("end_of_data", settlement.verdict_came)
        if chunked:
            self._write_content()
        else:
            self._write_content(b".\r\n")

    def _end_unsent(self, answer: Callable[[Reply], None]) -> None:
        """The end of data cannot go up: the client, which has waited for its end, hears why."""
        reply = self.course.broken or LOST
        if not self._account.client_gone:
            self._account.client_heard = reply
            answer(reply)
        self._conclude(self.course.broken_as, reply)

    def _answer_behind(self, answer: Callable[[Reply], None], reply: Reply) -> None:
        """Give what the last chunk is up behind, and has no reply, the same: it would hold up this one."""
        for earlier in tuple(self._sent):
            earlier.answer(reply)
        answer(reply)

    # Other ends

    def client_gone(self) -> None:
        """The client has disconnected."""
        self._account.client_gone = True
        self.abandon()

    def silent(self) -> None:
        """The client has been silent for too long in the middle: give the connection to those who move."""
        if self._lease.connection is not None:
            self._drop_lease()
            self._break(SILENT, Outcome.ABORTED)

    def abandon(self) -> None:
        """End without an end of data: RSET, QUIT, a new EHLO, or the client has gone."""
        if self.concluded or self._settlement is not None:
            return
        self._drop_lease()
        self._take_stock()
        self._conclude(self.course.outcome(chosen=self._chosen), self.course.last_reply)

    def _drop_lease(self) -> None:
        """Give the connection back, or cut it where something is unfinished on it."""
        lease = self._lease
        lease.end_wait()
        if lease.connection is None:
            return
        # Between two chunks RSET is allowed, and clears those that are up (RFC 3030 2).
        in_content = self.body.left > 0 if isinstance(self.body, Chunks) else self.body is not None
        if in_content or self._sent:
            lease.cut("transaction unfinished")
        else:
            # A refused MAIL opened nothing, but what XFORWARD said would stay in force for the next client.
            introduced = self._client is not None and lease.pool.xforward
            lease.release(reset=not self.course.mail_refused or introduced)

    # The one place where the outcome is said

    def _conclude(self, outcome: Outcome, said: object) -> None:
        if self.concluded:
            return
        self.concluded = True
        self._settlement = None
        self._account.total_s = self._loop.time() - self._account.began
        self._account.close(self._services.metrics, outcome, None if said is None else str(said))

    def _take_stock(self) -> None:
        """Bring the account up to date."""
        account = self._account
        account.total_s = self._loop.time() - account.began
        if self.body is not None:
            account.received, account.size = self.body.received, self.body.size


def refused_at_mail(metrics: Metrics, sender: Sender, reverse_path: bytes, reply: Reply) -> None:
    """Count and log a transaction that the relay's own policy refused at MAIL."""
    account = Account(uuid7(), sender, Envelope(reverse_path), 0.0)
    account.client_heard = reply
    account.close(metrics, Outcome.REFUSED, None)


def _refuse_recipient(command: Command, reply: Reply) -> None:
    """Answer a RCPT that goes up to no upstream."""
    cast("Recipient", command.recipient).answered(reply)
    command.answer(reply)


def _ignore(_: object) -> None:
    """Take no notice."""
