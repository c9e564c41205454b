"""One transaction on a stage where client, upstream, store and time do what the test says, in any order.

Real: the transaction, its account, the connection, the pool, the replies' order, metrics and log. Played by
the stage: the octets' way to and from the upstream (`Line`, which reads what it is sent as an upstream
would, and so knows by itself what was accepted), the dialer, the recorder's face (`Keeper`), and the session,
which keeps the rules of `relay/session/dialogue.py` about what may be said when.

Rules: `services_for` and `transaction_for` are the only places that know how the parts are built. After each
event `look` holds what was seen against the promises; `finale` lets everything come that can come, and holds
the end against them. A broken promise is an AssertionError that names it.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from relay import maillog
from relay.account import Sender
from relay.answers import MAX_RECEIVED
from relay.classify import Classifier
from relay.metrics import NO_UPSTREAM, Metrics
from relay.outcome import Outcome
from relay.records.model import Entry, Record
from relay.reply import Reply, ReplyParser
from relay.services import Services
from relay.session.replies import Replies
from relay.settings import UpstreamSettings
from relay.transaction import Transaction
from relay.upstream.capabilities import Capabilities
from relay.upstream.connection import Connection
from relay.upstream.dial import UNREACHABLE, Dialed, DialError
from relay.upstream.pool import Pool
from relay.upstream.routing import Way
from relay.upstream.upstreams import Route
from tests.support.clockwork import Clockwork
from tests.support.snapshot import snapshot

__all__ = ["Event", "Stage"]

Event = tuple[str, str]
"""Who does something, and what."""

VERDICT_S = 10.0
"""After how long the client is told that there is no verdict; after twice this it is given up."""
REPLY_S = 25.0
"""How long any other reply is awaited."""
TICK_S = 11.0
"""How far one `time` event goes."""
MAX_SIZE = 40_000
RECIPIENTS = 2
CHUNK = b"Chunk!"
_COMMANDS = frozenset(("MAIL", "RCPT", "DATA", "RSET", "QUIT"))

HEADER = b"Subject: x\r\nX-Task-Type: t\r\n\r\nText\r\n"
BIG = b"." + b"x" * 997 + b"\r\n"
TEXTS = {
    "text": HEADER,
    "much text": BIG * 20,
    "too much": BIG * 45,
    "stray newline": b"bare\nLF\r\n",
    "loop": b"Received: x\r\n" * (MAX_RECEIVED + 1) + b"\r\n",
}
BAD_TEXTS = frozenset(("too much", "stray newline", "loop"))
END = b"Last line\r\n.\r\n"

SETTINGS = UpstreamSettings.model_validate(
    {
        "name": "primary",
        "address": "127.0.0.1:25",
        "tls": "none",
        "max_connections": 1,
        "lease_wait_timeout": "5s",
        "reply_timeout": f"{REPLY_S:g}s",
        "end_of_data_timeout": f"{VERDICT_S:g}s",
    }
)
METRICS = Metrics(upstreams=["primary"], listeners=["test"], task_types=["t"])
CLASSIFIER = Classifier(headers=["X-Task-Type"], default="email", id_header="X-Task-Id", rules=[], keep=[])
SENDER = Sender("192.0.2.1", "test")
REVERSE_PATH = b"a@client.test"
# What the relay itself refuses is nobody's.
_OUTCOMES = [outcome for _ in range(2) for outcome in Outcome]
_UPSTREAMS = [METRICS.upstreams[name] for name in ("primary", NO_UPSTREAM)]
_COUNTERS = [upstream._messages[outcome] for upstream in _UPSTREAMS for outcome in Outcome]


def services_for(stage: Stage) -> Services:
    """Build what transactions are given to work with."""
    return Services(
        recorder=stage.keeper,  # type: ignore[arg-type]
        journal=stage.notes,  # type: ignore[arg-type]
        classifier=CLASSIFIER,
        metrics=METRICS,
        normalize=False,
        max_message_size=MAX_SIZE,
        settling=set(),
        running=set(),
        loop=stage.loop,
    )


def transaction_for(stage: Stage) -> Transaction:
    """Begin a transaction, with nothing sent."""
    route = Route([(Way("primary", 0, 1, None), stage.pool)])
    return Transaction(stage.services, route, SENDER, REVERSE_PATH)


# ------------------------------------------------------------------------------------------- upstream


class Line(asyncio.Transport):
    """One connection as the upstream sees it: it reads what it is sent by the rules of RFC 5321 and 3030."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.over = False
        """Whether the relay has let go of it."""
        self.asked: deque[str] = deque()
        """Commands that are whole and not answered, as the session names them."""
        self.open = False
        """Whether a mail transaction is open."""
        self.refused = False
        """Whether MAIL was refused."""
        self.accepted = 0
        """Recipients that were accepted."""
        self.recipients = 0
        """Recipients that may have been accepted, or will be."""
        self.spoiled = ""
        """Why the relay can not trust it any more; empty: it can."""
        self.content = b""
        """What came of the message."""
        self.paused = False
        self._mode = "commands"
        self._input = b""
        self._chunk_left = 0
        self._chunk_last = False
        self._chunks = 0
        self._protocol: Any = None

    # The transport's face

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits here: it is told when to pause."""
        del high, low

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def resume_reading(self) -> None:
        """It is never paused."""

    def is_closing(self) -> bool:
        return self.over

    def write(self, data: Any) -> None:
        self.stage.hold(not self.over, "written to a connection that is gone")
        self._input += bytes(data)
        while self._input and self._read():
            pass

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def abort(self) -> None:
        if not self.over:
            self.over = True
            self.stage.loop.call_soon(self._protocol.connection_lost, None)

    def close(self) -> None:
        # What is buffered would still be sent, and then it looks whole.
        self.stage.hold(self._mode == "commands", "closed, not aborted, with content unfinished")
        self.abort()

    # What it reads

    @property
    def clean(self) -> bool:
        """Whether another client's transaction may begin on it: none is open, whatever RSET is answered."""
        if self.open or self.spoiled or self._input or self._mode != "commands":
            return False
        return not self.asked or tuple(self.asked) == ("RSET",)

    @property
    def usable(self) -> bool:
        """Whether the relay would still use it."""
        return not self.over and self._protocol.usable

    def _read(self) -> bool:
        if self._mode == "content":
            return self._read_content()
        if self._mode == "chunk":
            return self._read_chunk()
        line, end, rest = self._input.partition(b"\r\n")
        if not end:
            return False
        self._input = rest
        self._command(line.decode())
        return True

    def _command(self, line: str) -> None:
        verb = line.split(maxsplit=1)[0]
        if verb == "BDAT":
            words = line.split()
            self._mode, self._chunk_left, self._chunk_last = "chunk", int(words[1]), words[-1] == "LAST"
            self._read_chunk()
            return
        self.stage.hold(verb in _COMMANDS, f"content read as a command: {line}")
        if verb not in ("RSET", "QUIT"):
            self.stage.begun_on(self)
        self.recipients += verb == "RCPT"
        self.asked.append(line)

    def _read_content(self) -> bool:
        # The line end before the content is that of DATA (RFC 5321 4.1.1.4).
        content, end, rest = (b"\r\n" + self._input).partition(b"\r\n.\r\n")
        if not end:
            return False
        self.content, self._input, self._mode = content[2:] + end[:2], rest, "commands"
        self.asked.append("end of data")
        if self.accepted:
            self.stage.terminated(self)
        return True

    def _read_chunk(self) -> bool:
        octets, self._input = self._input[: self._chunk_left], self._input[self._chunk_left :]
        self.content += octets
        self._chunk_left -= len(octets)
        if self._chunk_left:
            return False
        self._mode = "commands"
        if self._chunk_last:
            self.asked.append("end of data")
            self.stage.terminated(self)
        else:
            self._chunks += 1
            self.asked.append(f"chunk {self._chunks}")
        return True

    # What it says

    def say(self, code: int, *, twice: bool = False) -> None:
        """Answer the next command, or nothing, if none is there to be answered."""
        octets = self._reply(code)
        if twice:
            octets += self._reply(code)
        self._protocol.data_received(octets)

    def _reply(self, code: int) -> bytes:
        number = self.stage.number()
        asked = self.asked.popleft() if self.asked else ""
        if code == 421:
            self.spoiled = self.spoiled or "421"
        elif not asked:
            self.spoiled = self.spoiled or "an answer to nothing"
        elif (code == 354) != (asked == "DATA" and code < 400):
            self.spoiled = self.spoiled or f"{code} to {asked}"
        if not self.spoiled or self.spoiled == "421":
            self._answered(asked, code)
            self.stage.answers[number] = asked
        return b"%d %d.0.0 number %d\r\n" % (code, code // 100, number)

    def _answered(self, asked: str, code: int) -> None:
        positive = code < 300
        if asked.startswith("MAIL"):
            self.open = self.open or positive
            self.refused = not positive
        elif asked.startswith("RCPT"):
            self.accepted += positive and self.open
            self.recipients -= not positive
        elif asked == "DATA" and code == 354:
            self._mode = "content"
        elif asked == "RSET" and positive:
            self.open, self.accepted = False, 0
        elif asked == "end of data":
            self.open = self.open and not positive and self._chunks > 0
            if self.accepted:
                self.stage.verdict = code

    def babble(self) -> None:
        self.spoiled = self.spoiled or "garbage"
        self._protocol.data_received(b"what is this\r\n")

    def fin(self) -> None:
        self.spoiled = self.spoiled or "closed"
        self._protocol.eof_received()

    def rst(self) -> None:
        self.spoiled = self.spoiled or "reset"
        self.over = True
        self._protocol.connection_lost(ConnectionResetError("reset by peer"))

    def pause(self, paused: bool) -> None:
        self.paused = paused
        if paused:
            self._protocol.pause_writing()
        else:
            self._protocol.resume_writing()


class StageDialer:
    """Dials end when the stage says so, and as it says."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._asked: list[asyncio.Future[bool]] = []

    @property
    def pending(self) -> list[asyncio.Future[bool]]:
        return [answer for answer in self._asked if not answer.done()]

    async def dial(self, credentials: object = None) -> Dialed:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        try:
            succeeds = await answer
        finally:
            self._asked.remove(answer)
        if not succeeds:
            raise DialError("unreachable", "refused", UNREACHABLE)
        line = Line(self.stage)
        self.stage.lines.append(line)
        return Dialed(line, self.stage.capabilities, Reply.own(250, "0.0", "hello"))


# ---------------------------------------------------------------------------------------------- store


class Keeper:
    """The recorder's face: what it is given is durable when the stage says so."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.entries: list[Entry] = []
        self.waiting: deque[tuple[Entry, asyncio.Future[None]]] = deque()
        self.durable: list[Entry] = []
        self.failed = 0
        self.room = True
        """Whether there is room for another promise."""
        self.promised = 0

    def record(self, entry: Entry) -> asyncio.Future[None]:
        self.stage.given(entry)
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.entries.append(entry)
        self.waiting.append((entry, kept))
        return kept

    def refusal(self) -> str | None:
        return None

    def promise(self, octets: int) -> bool:
        if self.room:
            self.promised += octets
        return self.room

    def release(self, octets: int) -> None:
        self.promised -= octets
        self.stage.hold(self.promised >= 0, "more released than was promised")

    def commit(self) -> None:
        entry, kept = self.waiting.popleft()
        self.durable.append(entry)
        kept.set_result(None)

    def fail(self) -> None:
        _, kept = self.waiting.popleft()
        self.failed += 1
        kept.set_exception(RuntimeError("the recorder breaks"))


class Notes:
    """The journal's face."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.in_use: set[int] = set()
        self.entered = 0

    def enter(self, line: bytes) -> int | None:
        self.stage.hold(bool(line), "nothing is known of the message")
        self.entered += 1
        self.in_use.add(self.entered)
        return self.entered

    def free(self, slot: int) -> None:
        self.stage.hold(slot in self.in_use, "a slot that is free is freed")
        self.in_use.discard(slot)

    def refusal(self) -> str | None:
        return None


# ---------------------------------------------------------------------------------------------- stage


class Stage:
    """One transaction, whose MAIL is given at once.

    `idle`: the pool has a connection that was used before. `busy`: its only one is somebody else's.
    """

    def __init__(
        self, *, pipelining: bool = True, idle: bool = False, busy: bool = False, chunking: bool = True
    ) -> None:
        keywords = {"PIPELINING": pipelining, "CHUNKING": chunking}
        self.capabilities = Capabilities(frozenset(word for word, offered in keywords.items() if offered))
        self.loop = Clockwork()
        self.log = io.BytesIO()
        maillog.configure("json", "info", self.log)
        self.lines: list[Line] = []
        self.dialer = StageDialer(self)
        self.keeper = Keeper(self)
        self.notes = Notes(self)
        METRICS.settle()
        self._counted = _counts()
        self._errors = METRICS._record_errors.value
        self.pool: Pool = self.loop.at_once(
            lambda: Pool(SETTINGS, self.dialer, METRICS.upstreams["primary"])  # type: ignore[arg-type]
        )
        self.other: Connection | None = None
        if idle or busy:
            self._prepare(idle=idle)
        # What the session knows.
        self.state = "commands"
        self.has_transaction = False
        self.replies = Replies(self._heard, self._moved)
        self.commands: list[str] = []
        """What the client gave, in order; each is owed one reply."""
        self.heard: list[Reply] = []
        self.flow_paused = False
        self.finished_at: float | None = None
        self.told_verdict: Reply | None = None
        self.gone = False
        self.sent = b""
        """The content that the client has given, as it is to arrive."""
        self.bad = False
        """Whether there was something in it that the relay must not pass on."""
        self._parser = ReplyParser()
        # What the upstream knows.
        self.answers: dict[int, str] = {}
        """Which command a reply with this number was given to."""
        self.verdict: int | None = None
        """The code of the upstream's reply to the end of data."""
        self.terminators = 0
        self.ended_on: Line | None = None
        self.mail_line: Line | None = None
        self.gave_up = False
        self.broken: list[str] = []
        """Promises that were broken."""
        self._numbers = 0
        # Begin.
        self.services = services_for(self)
        self.transaction: Transaction = self.loop.at_once(lambda: transaction_for(self))
        self.transaction.on_flow = self._on_flow
        self.begun = False

    def _prepare(self, *, idle: bool) -> None:
        leasing = self.loop.create_task(self.pool.acquire("somebody else"))
        self.loop.quiet()
        self.dialer.pending[0].set_result(True)
        self.loop.quiet()
        connection = leasing.result()
        connection.transactions += 1
        if idle:
            self.loop.at_once(lambda: self.pool.release(connection, reset=False))
        else:
            self.other = connection

    # Events

    def enabled(self) -> list[Event]:
        """Return what can happen next."""
        if not self.begun:
            return [("client", "mail")]
        return [*self._client_events(), *self._upstream_events(), *self._other_events()]

    def _client_events(self) -> list[Event]:
        found: list[str] = []
        transaction = self.transaction
        open_ = self.has_transaction and not transaction.refused
        recipients = len(transaction.envelope.recipients)
        if self.state == "commands" and open_:
            if recipients < RECIPIENTS:
                found.append("rcpt")
            if recipients and not transaction.chunking and "DATA" not in self.commands:
                found.append("data")
            if self._chunk_may_begin():
                found += ["chunk", "half chunk", "stray chunk", "last chunk"]
            elif self._message_may_go_ahead():
                found.append("last chunk")
        if self.state == "content":
            found += [*TEXTS, "end"]
        if self.state == "chunk":
            found.append("rest")
        if self.state in ("content", "chunk") or (self.state == "commands" and transaction.chunking):
            found.append("pass on")
        if self.state == "commands" and self.has_transaction and not self.replies.owed:
            found.append("rset")
        if self.has_transaction and (
            self.state in ("content", "chunk") or (self.state == "commands" and not self.replies.owed)
        ):
            found.append("silent")
        if self.state != "closed" and (self.has_transaction or self.replies.owed):
            found.append("gone")
        return [("client", each) for each in found]

    def _chunk_may_begin(self) -> bool:
        """The rules of `Dialogue._must_wait` and of `_refusal_of_chunk`."""
        transaction = self.transaction
        if self.replies.owed and not transaction.chunk_may_follow:
            return False
        if (
            transaction.data_tried
            or transaction.course.nobody_accepted
            or not transaction.envelope.recipients
        ):
            return False
        return sum(each.startswith("chunk") for each in self.commands) < 2

    def _message_may_go_ahead(self) -> bool:
        """The rule of `Dialogue._chunk_must_wait` about the first chunk."""
        transaction = self.transaction
        if not self.replies.owed or transaction.chunking or "DATA" in self.commands:
            return False
        return not transaction.course.nobody_accepted and transaction.takes_ahead(CHUNK)

    def _upstream_events(self) -> list[Event]:
        found: list[str] = []
        line = self.line
        if line is not None:
            found += ["2yz", "4yz", "5yz", "421", "two at once", "garbage", "fin", "rst"]
            if line.asked and line.asked[0] == "DATA":
                found.append("354")
            found.append("resume" if line.paused else "pause")
        if self.dialer.pending:
            found += ["dialed", "not dialed"]
        if self.other is not None and self.other.usable:
            found.append("other ends")
        return [("upstream", each) for each in found]

    def _other_events(self) -> list[Event]:
        found: list[Event] = []
        if self.keeper.waiting:
            found += [("store", "commits"), ("store", "breaks")]
        if self.time_matters:
            found.append(("time", "passes"))
        if self.services.settling and not self.gave_up:
            found.append(("relay", "gives up"))
        return found

    @property
    def time_matters(self) -> bool:
        """Whether anything waits that has an end."""
        line = self.line
        waits = line is not None and (line.asked or line.paused)
        return bool(self.dialer.pending or waits or self.services.settling)

    @property
    def line(self) -> Line | None:
        """The connection that is alive, if there is one."""
        mine = None if self.other is None else self.lines[0]
        return next((each for each in reversed(self.lines) if not each.over and each is not mine), None)

    def do(self, event: Event, *, quiet: bool = True) -> None:
        """Let an event happen; with `quiet` also all that follows by itself. Look after either."""
        self._happen(event)
        self.look()
        if quiet:
            self.quiet()

    def redo(self, event: Event, *, quiet: bool) -> None:
        """Let an event happen as another stage has seen it from the same beginning, without a look."""
        self._happen(event)
        if quiet:
            self.loop.quiet()

    def _happen(self, event: Event) -> None:
        who, what = event
        act: Callable[[], None]
        if who == "client":
            act = getattr(self, "_" + what.replace(" ", "_"), lambda: self._content(what))
        elif event == ("time", "passes"):
            self.loop.advance(TICK_S)
            act = self._sweep
        else:
            act = {
                ("upstream", "dialed"): lambda: self.dialer.pending[0].set_result(True),
                ("upstream", "not dialed"): lambda: self.dialer.pending[0].set_result(False),
                ("upstream", "other ends"): self._other_ends,
                ("store", "commits"): self.keeper.commit,
                ("store", "breaks"): self.keeper.fail,
                ("relay", "gives up"): self._gives_up,
            }.get(event) or self._upstream_act(what)
        self.loop.at_once(act)

    def quiet(self) -> None:
        """Let everything happen that follows by itself."""
        self.loop.quiet()
        self.look()
        if self.gave_up and not self.keeper.waiting:
            assert self.transaction.concluded, "given up, and still not concluded"

    def _upstream_act(self, what: str) -> Callable[[], None]:
        line = self.line
        assert line is not None
        codes = {"2yz": 250, "354": 354, "4yz": 450, "5yz": 550, "421": 421}
        if what in codes:
            return lambda: line.say(codes[what])
        return {
            "two at once": lambda: line.say(250, twice=True),
            "garbage": line.babble,
            "fin": line.fin,
            "rst": line.rst,
            "pause": lambda: line.pause(True),
            "resume": lambda: line.pause(False),
        }[what]

    def _other_ends(self) -> None:
        assert self.other is not None
        self.pool.release(self.other, reset=False)
        self.other = None

    def _gives_up(self) -> None:
        self.gave_up = True
        for message in tuple(self.services.settling):
            message.give_up()

    def _sweep(self) -> None:
        """What the relay does once a second."""
        now = self.loop.time()
        for message in tuple(self.services.settling):
            message.check(now)
        self.pool.sweep(now)
        overdue = self.finished_at is not None and now > self.finished_at + VERDICT_S
        if overdue and self.verdict is None and not self.gone:
            assert self.told_verdict is not None, "the client waits for a verdict that is overdue"

    # What the client does

    def _give(self, command: str) -> Callable[[Reply], None]:
        self.commands.append(command)
        return self.replies.owe()

    def _mail(self) -> None:
        self.begun = self.has_transaction = True
        line = "MAIL FROM:<a@client.test>"
        self.transaction.mail(line.encode() + b"\r\n", self._give(line))

    def _rcpt(self) -> None:
        path = f"{len(self.transaction.envelope.recipients) + 1}@far.test"
        line = f"RCPT TO:<{path}>"
        self.transaction.rcpt(line.encode() + b"\r\n", path.encode(), self._give(line))

    def _data(self) -> None:
        self.state = "awaits 354"
        answer = self._give("DATA")

        def answered(reply: Reply) -> None:
            if self.state == "awaits 354":
                self.state = "commands" if self.transaction.body is None else "content"
            answer(reply)

        self.transaction.data(answered)

    def _content(self, what: str) -> None:
        self._feed(TEXTS[what], bad=what in BAD_TEXTS)

    def _feed(self, block: bytes, *, bad: bool = False) -> None:
        # Where a header section has passed, "Received" is text; too much in all is too much as well.
        loop = block == TEXTS["loop"] and self.sent != b""
        self.sent += block
        self.bad = self.bad or (bad and not loop) or len(self.sent) > MAX_SIZE + 1000
        rest = self.transaction.feed(block)
        assert (rest is None) == (not block.endswith(b"\r\n.\r\n"))

    def _end(self) -> None:
        self.sent += END[:-3]
        rest = self.transaction.feed(END)
        assert rest == b""
        self._finish()

    def _finish(self) -> None:
        self.state = "settling"
        self.flow_paused = False
        self.commands.append("end of data")
        self.finished_at = self.loop.time()
        self.transaction.finish(self._settled)

    def _settled(self, reply: Reply) -> None:
        self.hold(self.told_verdict is None, "the client is told twice what became of the message")
        self.told_verdict = reply
        self._look_at_verdict(reply)
        self.has_transaction = False
        if self.state == "settling":
            self.state = "commands"
        self.replies.say(reply)
        self._moved()

    def _chunk_begins(self, octets: bytes, *, last: bool) -> None:
        self.sent += octets
        self.transaction.begin_chunk(len(octets), last=last)

    def _chunk_ends(self, *, last: bool) -> None:
        self.state = "commands"
        if last:
            self._finish()
        else:
            number = sum(each.startswith("chunk") for each in self.commands) + 1
            self.transaction.end_chunk(self._give(f"chunk {number}"))

    def _chunk_whole(self, octets: bytes, *, last: bool) -> None:
        self._chunk_begins(octets, last=last)
        self.transaction.feed_chunk(octets)
        self._chunk_ends(last=last)

    def _chunk(self) -> None:
        self._chunk_whole(CHUNK, last=False)

    def _half_chunk(self) -> None:
        self._chunk_begins(CHUNK, last=True)
        self.state = "chunk"
        self.transaction.feed_chunk(CHUNK[:3])

    def _rest(self) -> None:
        self.transaction.feed_chunk(CHUNK[3:])
        self._chunk_ends(last=True)

    def _last_chunk(self) -> None:
        self._chunk_whole(CHUNK, last=True)

    def _stray_chunk(self) -> None:
        self.bad = True
        self._chunk_whole(b"a\nb\r\n", last=False)

    def _pass_on(self) -> None:
        self.transaction.pass_on()

    def _rset(self) -> None:
        self._reset()
        self.commands.append("RSET")
        self.replies.say(Reply.own(250, "0.0", "OK"))

    def _reset(self) -> None:
        had, self.has_transaction = self.has_transaction, False
        self.flow_paused = False
        if had:
            self.transaction.abandon()

    def _silent(self) -> None:
        self.transaction.silent()

    def _gone(self) -> None:
        self.state = "closed"
        self.gone = True
        had, self.has_transaction = self.has_transaction, False
        if had:
            self.transaction.client_gone()

    # What the session is told

    def _moved(self) -> None:
        if self.has_transaction and self.transaction.over:
            self._reset()

    def _on_flow(self, pause: bool) -> None:
        self.flow_paused = pause

    def _heard(self, octets: bytes) -> None:
        if self.gone:
            return
        for reply in self._parser.feed(octets):
            self.heard.append(reply)
            self.hold(len(self.heard) <= len(self.commands), f"{reply} answers nothing")
            command = self.commands[len(self.heard) - 1]
            self.hold(reply.code != 421, f"the upstream's 421 goes to the client at {command}")
            if reply.code < 400 and command != "RSET":
                number = int(str(reply).rpartition(" ")[2])
                self.hold(self.answers.get(number) == command, f"{command} was answered by {reply}")

    # What the promises are about

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def begun_on(self, line: Line) -> None:
        """A command of the transaction has come up on `line`."""
        mail_heard = bool(self.heard) and self.heard[0].positive
        self.hold(not mail_heard or line is self.mail_line, "begun anew after MAIL was accepted")
        self.hold(self.finished_at is None or line is self.mail_line, "begun anew after the end of data")
        self.mail_line = line

    def terminated(self, line: Line) -> None:
        """The message's end of data has come up on `line`."""
        self.terminators += 1
        self.hold(self.terminators == 1, "the message was sent twice")
        self.hold(self.finished_at is not None, "ended before the client had ended it")
        self.hold(not self.bad, "content that was refused went up whole")
        self.hold(not line.spoiled, f"ended on a connection that had failed ({line.spoiled})")
        self.hold(line.content == self.sent, "the content is not the client's")
        self.ended_on = line

    def given(self, entry: Entry) -> None:
        """The recorder gets an entry."""
        self.hold(entry.task_id == self.transaction.task_id, "an entry for another message")
        if isinstance(entry, Record):
            self.hold(self.verdict is not None and self.verdict < 300, f"a row after {self.verdict}")
            self.hold(not any(isinstance(each, Record) for each in self.keeper.entries), "two rows")
            self.hold(entry.upstream_reply.startswith(f"{self.verdict} "), "not the upstream's reply")

    def _look_at_verdict(self, reply: Reply) -> None:
        self.hold(not self.gone, "a verdict to nobody")
        rows = [each for each in self.keeper.durable if isinstance(each, Record)]
        self.hold(
            not reply.positive or bool(rows) or self.keeper.failed > 0, "accepted, and no row is durable"
        )

    def hold(self, kept: bool, promise: str) -> None:
        """Fail unless the promise is kept, also where the relay catches what is raised here."""
        if not kept:
            self.broken.append(promise)
            raise AssertionError(promise)

    def look(self) -> None:
        """Hold what is now against what must always be."""
        assert not self.broken, self.broken[0]
        assert not self.loop.errors, f"{self.loop.errors}"
        for connection in self.pool._idle:
            line: Any = connection._transport
            assert line.clean, f"given back unclean: {line.asked} {line.spoiled} {line._mode}"
            assert connection.lessee is None
        for line in self.lines:
            assert not line.spoiled or not line.usable, f"trusted although {line.spoiled}"
        if self.transaction.concluded:
            assert not self.services.settling
        outcomes = self.outcomes()
        assert len(outcomes) <= 1, f"concluded {outcomes}"

    def outcomes(self) -> list[str]:
        """Return the outcomes that metrics have counted for this transaction."""
        counts = _counts()
        if counts == self._counted:
            return []
        pairs = zip(_OUTCOMES, self._counted, counts, strict=True)
        return [outcome.value for outcome, before, now in pairs for _ in range(int(now - before))]

    # The end

    def finale(self) -> None:
        """Let all come that can still come, and look at the end."""
        for _ in range(4):
            while self.keeper.waiting:
                self.do(("store", "commits"))
            while self.dialer.pending:
                self.do(("upstream", "not dialed"))
            self.do(("time", "passes"))
        if not self.begun:
            return self.close()
        if not self.gone:
            assert not self.replies.owed, f"no reply: {self.commands[len(self.heard) :]}"
            assert self.state not in ("settling", "awaits 354"), f"hangs in {self.state}"
            assert len(self.heard) == len(self.commands)
            self.do(("client", "gone"))
        self.quiet()
        self._look_at_end()
        return self.close()

    def _look_at_end(self) -> None:
        transaction = self.transaction
        assert transaction.concluded, "never concluded"
        assert not self.services.settling, "still settling"
        assert not self.services.running, "a task is left over"
        assert not self.keeper.promised, "room is kept for a row that does not come"
        assert self.notes.entered <= 1, "in the journal twice"
        assert self.keeper.failed or not self.notes.in_use, "the journal still has it"
        maillog.flush()
        logged = [json.loads(line) for line in self.log.getvalue().splitlines()]
        lines = [line for line in logged if line["event"] == "message"]
        unforeseen = [line for line in logged if line["event"] == "unforeseen"]
        assert len(unforeseen) == self.keeper.failed, unforeseen
        assert METRICS._record_errors.value - self._errors == self.keeper.failed
        assert len(lines) == 1, f"{len(lines)} lines in the log"
        (outcome,) = self.outcomes()
        line = lines[0]
        assert line["outcome"] == outcome, f"{line['outcome']} in the log, {outcome} counted"
        self._look_at_outcome(outcome, line)

    def _look_at_outcome(self, outcome: str, line: dict[str, Any]) -> None:
        rows = [each for each in self.keeper.entries if isinstance(each, Record)]
        accepted = self.verdict is not None and self.verdict < 300
        assert (outcome == "accepted") == accepted == bool(rows), f"{outcome} after {self.verdict}"
        told = self.told_verdict
        if told is not None and told.positive:
            assert outcome == "accepted"
        ended_on = self.ended_on
        if ended_on is not None and self.verdict is None:
            nowhere = ended_on.refused or not ended_on.recipients
            assert (outcome == "in_doubt") is not nowhere, f"{outcome}, and nobody knows"
        if not self.terminators:
            assert outcome != "in_doubt"
        if self.verdict is not None and self.verdict >= 400:
            assert outcome in ("deferred", "rejected"), f"{outcome} after {self.verdict}"
        if self.bad and self.finished_at is not None:
            assert not self.terminators
            assert outcome != "accepted"
        # The log says what the client heard to the end of data, where it was there to hear it.
        heard = None if told is None else str(told)
        assert line.get("client_reply") == heard, f"{line.get('client_reply')} in the log, {heard} heard"
        if rows and "client_reply" in rows[0].data:
            late = rows[0].data["client_reply"]
            assert late == heard, f"{late} in the row, {heard} heard"

    def close(self) -> None:
        """Stop; nothing may be left."""
        closing = self.loop.create_task(self.pool.close())
        self.loop.advance(TICK_S)
        assert closing.done()
        assert all(line.over for line in self.lines), "a connection is left open"
        left = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        assert not left, f"left over: {left}"
        assert not self.loop.errors, f"{self.loop.errors}"
        assert not self.broken, self.broken[0]
        self.loop.close()

    def discard(self) -> None:
        """Drop everything as it is, without a look; also what is broken."""
        if self.loop.is_closed():
            return
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.quiet()
        self.loop.errors.clear()
        self.loop.close()

    def mark(self) -> Any:
        """Return what the future depends on, so that two ways to the same place are known as one."""
        lines = [
            (each.over, tuple(each.asked), each.open, each.accepted, each.spoiled, each._mode, each.paused)
            for each in self.lines
        ]
        own = (
            self.state,
            self.has_transaction,
            self.gone,
            self.bad,
            self.gave_up,
            self.verdict,
            self.terminators,
            len(self.sent),
            tuple(self.commands),
            tuple(reply.code for reply in self.heard),
            None if self.told_verdict is None else self.told_verdict.code,
            tuple(self.outcomes()),
            len(self.keeper.waiting),
            len(self.keeper.durable),
            self.keeper.failed,
            len(self.dialer.pending),
            self.other is None,
            tuple(lines),
        )
        return own, self.loop.pending, snapshot(self.loop, [self.transaction, self.pool, self.services])


def _counts() -> list[float]:
    for upstream in _UPSTREAMS:
        upstream.settle()
    return [counter.value for counter in _COUNTERS]
