"""Hostile sessions over real sockets: whatever a client sends, in whatever pieces, these hold.

- The relay lives: nothing unforeseen is logged, no task and no session is left, the next client is served.
- Replies are well formed, one for each command, in order; what was said is what happened.
- The upstream has exactly the messages whose end of data the client sent and heard a verdict of, with the
  client's own MAIL and RCPT, octet for octet; rows are what it accepted, and nothing else.

FUZZ_INPUTS (default 1600) and FUZZ_SEED (default 1) in the environment make runs longer and other:
`FUZZ_INPUTS=200000 FUZZ_SEED=7 pytest tests/property/test_session_fuzz.py --timeout=0 -s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from relay import maillog
from relay.answers import FAULTS, LOOP
from relay.session import dialogue as dialogue_module
from relay.session.session import Session
from tests.support.client import Client
from tests.support.content import unstuff
from tests.support.fuzz import Guide, Input, Inputs, shown
from tests.support.told import Account, account
from tests.support.upstream import EXTENSIONS, ScriptedUpstream
from tests.support.watch import eventually

if TYPE_CHECKING:
    from tests.conftest import Running
    from tests.support.connection import Connection
    from tests.support.upstream import Message

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1600"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
VARIANTS = [
    (bare_newlines, extensions)
    for bare_newlines in ("normalize", "refuse")
    for extensions in (EXTENSIONS, EXTENSIONS[1:])
]

WARM_UP = 20
"""Inputs until all that the relay does beside its sessions has begun."""
OWN_VERDICTS = {LOOP.wire, *(reply.wire for reply in FAULTS.values())}
"""Replies to an end of data that never went upstream."""
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
AUTH_PARAMETER = re.compile(rb" +AUTH=[^ \r\n]+(?=[ \r]|$)", re.IGNORECASE)
"""Not passed on to an upstream without AUTH (RFC 4954 5): the one thing that a command may lose."""
STRAY = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")


@pytest.fixture
def log() -> Iterator[io.BytesIO]:
    stream = io.BytesIO()
    maillog.configure("json", "debug", stream)
    yield stream
    maillog.configure("json", "info")


class Traffic:
    """What the relay has read and said in the session that runs, seen at its own door.

    At the client's, a reset that follows the last word may overtake it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        self.said = b""
        data_received, write = Session.data_received, Session.write

        def received(session: Session, data: bytes) -> None:
            self.read += len(data)
            data_received(session, data)

        def written(session: Session, octets: bytes) -> None:
            if session.transport is not None:
                self.said += octets
            write(session, octets)

        monkeypatch.setattr(Session, "data_received", received)
        monkeypatch.setattr(Session, "write", written)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    monkeypatch.setattr(dialogue_module, "ERROR_WAIT", 0.001)
    return Traffic(monkeypatch)


@pytest.mark.timeout(300 + INPUTS)
@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=["-".join((v[0], v[1][0])) for v in VARIANTS])
async def test_whatever_a_client_sends(number: int, start: Any, traffic: Traffic, log: io.BytesIO) -> None:
    bare_newlines, extensions = VARIANTS[number]
    inputs, guide = Inputs(SEED * len(VARIANTS) + number), Guide()
    count, delivered = INPUTS // len(VARIANTS), 0
    async with (
        ScriptedUpstream(whims(), extensions=extensions) as upstream,
        start(upstream.port, server={"bare_newlines": bare_newlines}) as running,
    ):
        play = Play(running, upstream, traffic, log)
        await play.at_rest()
        for _ in range(count):
            steps = inputs.next()
            try:
                with guide:
                    await play.run(steps)
                delivered += play.check()
            except Exception as error:
                error.add_note(f"{shown(steps)}\nsaid: {play.said!r}\n{upstream.transcript()}")
                raise
            if guide.is_new():
                inputs.keep(steps)
            play.forget()
    assert delivered > count // 20  # else it was not about mail
    print(f"{number}: {count} inputs, {delivered} messages, {inputs.kept} kept, {guide.ways} ways")


def whims() -> dict[str, Any]:
    """Return a script by which the upstream refuses some of what it is given, by what is in it."""

    def path(stage: str, line: bytes, connection: Connection) -> bytes | None:
        if b"refused@" in line:
            return b"550-5.1.1 not\r\n550 5.1.1 here\r\n"
        return b"450 4.2.0 come back\r\n" if b"later@" in line else None

    def content(stage: str, line: bytes, connection: Connection) -> bytes | None:
        return b"554 5.7.1 refused\r\n" if b"X-Refuse" in connection.messages[-1].wire else None

    return {"MAIL": path, "RCPT": path, "end_of_data": content}


class Play:
    """One hostile session after the other, each with a check of what came of it."""

    def __init__(
        self, running: Running, upstream: ScriptedUpstream, traffic: Traffic, log: io.BytesIO
    ) -> None:
        self.sent = b""
        self._running = running
        self._upstream = upstream
        self._traffic = traffic
        self._log = log
        self._client: Client
        self._was_reset = False
        self._rows = 0
        self._tasks: list[int] = []

    # The client

    async def run(self, steps: Input) -> None:
        """Carry an input out, up to the end of the session and whatever it leaves to do."""
        self.sent, self._was_reset = b"", False
        self._traffic.read, self._traffic.said = 0, b""
        async with Client(self._running.port) as self._client:
            for octets, behind in steps:
                if self._client.wire.lost:
                    break
                self._client.send_unread(octets)
                self.sent += octets
                if behind == "reset":
                    self._was_reset = True
                    self._client.reset()
                    break
                await getattr(self, f"_{behind}")()
            if not self._was_reset:
                with contextlib.suppress(OSError):  # the relay has reset it
                    self._client.half_close()
                heard = await self._client.expect_closed()
                assert self.said.startswith(heard)
        await self.at_rest()

    @property
    def said(self) -> bytes:
        """All that the relay has said in the session."""
        return self._traffic.said

    async def _go(self) -> None:
        """Send on at once."""

    async def _yield(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def _rest(self) -> None:
        await self._soon(self._waits_for_the_client)

    async def at_rest(self) -> None:
        """Return once nothing of a session is left."""
        await self._soon(self._is_at_rest)

    async def _soon(self, reached: Any) -> None:
        for _ in range(300):
            if reached():
                return
            await asyncio.sleep(0)
        await eventually(reached, lambda: f"{self._running.relay.reception!r} {self._running.pool!r}")

    def _waits_for_the_client(self) -> bool:
        wire = self._client.wire
        if wire.eof or wire.lost:
            return True
        reception = self._running.relay.reception
        return (
            self._traffic.read == len(self.sent)
            and not reception.services.running
            and not reception.services.settling
            and not any(
                session._dialogue._replies.owed or session._dialogue._slowed
                for session in reception._sessions
            )
        )

    def _is_at_rest(self) -> bool:
        reception, pool = self._running.relay.reception, repr(self._running.pool)
        return (
            repr(reception) == "<Reception: 0 sessions, 0 settling>"
            and not reception.services.running
            and " 0 active" in pool
            and " 0 connecting, 0 waiting" in pool
            and len(self._upstream.open_connections) == len(self._running.pool._open)
            and all(_has_seen_all(connection) for connection in self._upstream.connections)
        )

    # What came of it

    def check(self) -> int:
        """Check all that must hold; return how many messages were accepted."""
        self._check_tasks()
        assert self._upstream.violations == []
        self._check_log()
        self._check_commands()
        seen = list(self._upstream.messages)
        for message in (
            message for connection in self._upstream.connections for message in connection.messages
        ):
            assert not STRAY.search(message.wire)
        accepted = [message for message in seen if message.accepted]
        rows = self._running.rows(
            f"SELECT upstream_reply, size, sender FROM task_done WHERE id > {self._rows}"
        )
        assert [row["upstream_reply"] for row in rows] == [_text(message.reply) for message in accepted]
        assert [row["size"] for row in rows] == [len(message.content) for message in accepted]
        self._rows += len(rows)
        if self._was_reset:
            assert len(seen) <= (b"\r\n" + self.sent).count(b"\n.")
        else:
            self._check_told(account(self.sent, self.said), seen)
        return len(accepted)

    def _check_told(self, told: Account, seen: list[Message]) -> None:
        """Compare what the client was told with what the upstream has: the same messages, and no more."""
        assert told.greeting.startswith(b"220 ")
        assert all(reply[3:6] != b" 4." or reply[0:1] == b"4" for _, reply in told.answered)
        sent_up = [sent for sent in told.messages if sent.verdict not in OWN_VERDICTS]
        assert [sent.verdict for sent in sent_up] == [message.reply for message in seen]
        for sent, message in zip(sent_up, seen, strict=True):
            assert message.mail == b"MAIL " + AUTH_PARAMETER.sub(b"", sent.mail)
            assert message.rcpts == [b"RCPT " + rcpt for rcpt in sent.rcpts]
            if STRAY.search(sent.content):
                assert b"\0" not in sent.content
                meant = re.sub(
                    rb"(?<!\r)\n\.(?=\.)", b"\n", re.sub(rb"\r(?!\n)", b" ", unstuff(sent.content))
                )
                mended = re.sub(rb"(?<!\r)\n", b"\r\n", meant)
                assert message.content == mended
                assert self._running.relay.settings.server.bare_newlines == "normalize"
            else:
                assert message.wire == sent.content
        for sent in told.messages:
            if sent.verdict in OWN_VERDICTS:
                assert STRAY.search(sent.content) or sent.content.count(b"Received:") > 50

    def _check_commands(self) -> None:
        """No command goes upstream but the client's own, and those that keep a connection in order."""
        own = (b"EHLO relay.test", b"RSET", b"QUIT", b"DATA")
        lines = [line for connection in self._upstream.connections for line in connection.lines]
        sent = self.sent + AUTH_PARAMETER.sub(b"", self.sent)
        for line in lines:
            assert line in own or b" " + line[5:] + b"\r\n" in sent, line
            assert line in own or line.startswith((b"MAIL FROM:", b"RCPT TO:")) or line[:5].isupper(), line
        assert lines.count(b"DATA") <= self.sent.upper().count(b"DATA\r\n")

    def _check_log(self) -> None:
        lines = self._log.getvalue().decode("utf-8").split("\n")[:-1]
        for line in lines:
            assert not CONTROLS.search(line), line
            assert '"unforeseen"' not in line, line

    def _check_tasks(self) -> None:
        """No task is left behind; the relay's own are all there after the first few inputs."""
        count = self._own_tasks()
        if len(self._tasks) < WARM_UP:
            self._tasks.append(count)
        else:
            assert count <= max(self._tasks)

    def _own_tasks(self) -> int:
        """Count tasks, those of the upstream's connections apart."""
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        return len([name for name in names if name != "Connection.run"])

    def forget(self) -> None:
        """Let go of what was seen, so that a long run needs no more memory than a short one."""
        upstream = self._upstream
        upstream.connections[:] = upstream.open_connections
        for connection in upstream.connections:
            for kept in (connection.commands, connection.messages, connection.transcript):
                kept.clear()
        upstream.messages.clear()
        upstream.log.clear()
        self._log.seek(0)
        self._log.truncate()


def _has_seen_all(connection: Connection) -> bool:
    """Whether the upstream has acted on all that came on a connection."""
    if connection.open:
        return connection.idle and not connection.wire.waiting
    return connection.task is None or connection.task.done()


def _text(reply: bytes | None) -> str:
    assert reply is not None
    return reply.removesuffix(b"\r\n").decode("ascii")
