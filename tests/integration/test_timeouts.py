"""Every wait has its limit, and only that (RFC 5321 4.5.3.2).

No test here waits for a limit to pass: the relay looks at its waits with the time that it is told (`look`),
so the limits are the real defaults and no test depends on the speed of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from relay.session import dialogue as dialogue_module
from relay.session import session as session_module
from tests.support.client import Client
from tests.support.content import stuff
from tests.support.upstream import AfterOctets, Delay, ScriptedUpstream, Silence, StopReading
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from relay.session.session import Session
    from tests.conftest import Running

MAIL = b"MAIL FROM:<a@example.test>"
RCPT = b"RCPT TO:<b@example.test>"
CONTENT = b"Subject: one\r\n\r\ntext\r\n"
LARGE = b"Subject: large\r\n\r\n" + (b"x" * 998 + b"\r\n") * 20_000
"""More octets than all socket buffers on the way take."""

IDLE = 300.0
LEASE_IDLE = 30.0
CROWDED_IDLE = 10.0
REPLY = 300.0
END_OF_DATA = 600.0
GRACE = 30.0
"""The limits, in seconds, as they are if nobody sets them."""
SOON = 1.0
"""Seconds before and behind a limit at which the waits are looked at."""


def look(running: Running, seconds: float, *, elapsed: float = 0.0) -> None:
    """Look at all waits as if it were so many seconds later."""
    now = asyncio.get_running_loop().time() + seconds
    running.relay.reception.sweep(now, elapsed)
    running.pool.sweep(now)


def the_session(running: Running) -> Session:
    (session,) = running.relay.reception._sessions
    return session


def received(running: Running) -> int:
    """Return how many octets of content have come from the client."""
    transaction = the_session(running)._dialogue._transaction
    assert transaction is not None
    return transaction.body.received if transaction.body is not None else 0


def rejects(running: Running, reason: str) -> float:
    return running.metric("client_rejects_total", reason=reason)


# The client


@pytest.mark.parametrize("greeted", [False, True], ids=["before_EHLO", "after_EHLO"])
async def test_an_idle_session_ends_with_421(greeted: bool, start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await (client.ehlo() if greeted else client.greeting())
        look(running, IDLE - SOON)
        await client.command("NOOP" if greeted else "HELO client.test", 250)
        look(running, IDLE + SOON)
        assert (await client.expect(421)).text.startswith("4.4.2 ")
        await client.expect_eof()
        await nothing_left(running)
        assert rejects(running, "timeout") == 1
        assert outcomes(running) == {}


async def test_a_dripping_command_does_not_put_the_deadline_off(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        moved = asyncio.get_running_loop().time()
        await asyncio.sleep(
            0.05
        )  # the longer it were, the clearer: what drips now is later than the last move
        for octet in b"NOOP for ever":
            await client.send(bytes([octet]))
        await eventually(lambda: the_session(running)._dialogue._input.size == len(b"NOOP for ever"))
        look(running, IDLE - (asyncio.get_running_loop().time() - moved) + 0.01)
        await client.expect(421)
        await client.expect_eof()


@pytest.mark.parametrize("commands", [1, 2], ids=["alone", "pipelined"])
async def test_behind_many_errors_a_command_waits(
    commands: int, start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogue_module, "ERROR_WAIT", 3600.0)
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        dialogue = the_session(running)._dialogue
        for _ in range(dialogue_module.ERRORS_SLOW):
            await client.command("WHAT", 500)
        await client.send(b"NOOP\r\n" * commands)
        await eventually(lambda: dialogue._input.size == 6 * commands)
        look(running, IDLE + SOON)  # it is not the client that is waited for
        dialogue._resume()
        assert [reply.code for reply in await client.replies(commands)] == [250] * commands


async def test_a_client_silent_in_a_transaction_loses_its_lease_not_its_session(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 250)
        await client.command(RCPT, 250)
        look(running, LEASE_IDLE - SOON)
        await client.command(RCPT, 250)
        look(running, LEASE_IDLE + SOON)
        await eventually(lambda: " 0 active, 1 idle" in repr(running.pool))
        for command in (RCPT, b"DATA"):
            reply = await client.command(command, 451)
            assert reply.text.startswith("4.4.2 ")
        await client.command("RSET", 250)
        await counted(running, aborted=1)
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
        assert len(upstream.connections) == 1, "the connection was clean: RSET, and it is used again"
        await counted(running, aborted=1, accepted=1)


async def test_a_client_silent_in_its_content_loses_its_lease_not_its_session(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        await client.send(b"Subject: fast enough so far\r\n\r\n" + b"x" * 500 * 60 + b"\r\n")
        await eventually(lambda: received(running) > 500 * 60)
        look(running, LEASE_IDLE + SOON)
        await upstream.wait_for(lambda: not upstream.connections[0].open)
        await client.send(CONTENT + b".\r\n")
        assert (await client.expect(451)).text.startswith("4.4.2 ")
        assert upstream.messages == []
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
        await counted(running, aborted=1, accepted=1)
        assert len(running.rows()) == 1


async def turned_away(port: int) -> None:
    async with Client(port) as client:
        await client.expect(421)


async def test_a_client_has_so_many_places_and_gives_each_back(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, server={"max_connections_per_client": 2}) as running:
        for times in (1, 2, 3):
            async with Client(running.port) as one, Client(running.port) as two:
                await one.greeting()
                await two.greeting()
                await turned_away(running.port)
            await eventually(lambda: running.metric("client_sessions") == 0)
            assert rejects(running, "too_many_client_connections") == times
        assert not running.relay.reception._clients  # addresses are without number


async def test_who_is_idle_longest_makes_room_for_who_is_turned_away(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(start(upstream.port, server={"max_connections": 3}))
        busy, first, second = [await stack.enter_async_context(Client(running.port)) for _ in range(3)]
        for client in (busy, first, second):
            await client.ehlo()
        await busy.command(MAIL, 250)
        await first.command("NOOP", 250)  # so the second has been idle longer
        look(running, CROWDED_IDLE + SOON)  # nobody has been turned away
        await turned_away(running.port)
        look(running, CROWDED_IDLE - SOON)
        assert rejects(running, "crowded") == 0
        for _ in range(5):  # in between, the relay may have looked of itself
            if not rejects(running, "crowded"):
                await turned_away(running.port)
                look(running, CROWDED_IDLE + SOON)
        look(running, CROWDED_IDLE + SOON)
        assert rejects(running, "crowded") == 1
        assert (await second.expect(421)).text.startswith("4.4.2 ")
        await second.expect_eof()
        await first.command("NOOP", 250)
        await busy.command(RCPT, 250)


async def test_a_body_that_comes_too_slowly_is_aborted(start: Any, upstream: ScriptedUpstream) -> None:
    long = {"lease_idle_timeout": "1h"}  # so that the rate alone decides
    async with start(upstream.port, server=long) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        await client.send(b"Subject: slow\r\n")
        await eventually(lambda: received(running))
        look(running, GRACE - SOON)
        await client.send(b"x" * 500 * 60 + b"\r\n")
        await eventually(lambda: received(running) > 500 * 60)
        look(running, 60 - SOON)
        assert rejects(running, "slow") == 0, "500 octets a second and more are fast enough"
        look(running, 60 + SOON)
        assert (await client.expect(421)).text.startswith("4.4.2 ")
        await client.expect_eof()
        await nothing_left(running)
        await upstream.wait_for(lambda: not upstream.connections[0].open)
        assert upstream.messages == []
        await counted(running, aborted=1)
        assert rejects(running, "slow") == 1


async def test_the_client_does_not_pay_for_an_upstream_that_reads_slowly(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"body": AfterOctets(1, StopReading())}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        sending = asyncio.create_task(client.send(stuff(LARGE) + b".\r\n"))
        dialogue = the_session(running)._dialogue
        await eventually(lambda: dialogue._flow_paused)
        began = dialogue._content._began
        now = asyncio.get_running_loop().time()
        for minute in range(1, 5):  # up to reply_timeout, the limit for a write to the upstream
            running.relay.reception.sweep(now + minute * 60, 60.0)
        assert dialogue._content._began == pytest.approx(began + 240), "its clock stands meanwhile"
        dialogue._content._began, dialogue._last_moved = began, now  # the minutes were not real
        upstream.connections[0].wire.resume()
        await sending
        await client.expect(250)
        assert upstream.messages[0].content == LARGE
        await counted(running, accepted=1)


async def test_a_client_that_never_reads_is_cut_off(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = b"550-5.1.1 " + b"x" * 4000 + b"\r\n"
    upstream.script = {"RCPT": line * 15 + b"550 5.1.1 no\r\n"}  # long replies fill the buffers soon
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        client.wire.pause()
        client.send_unread(MAIL + b"\r\n" + (RCPT + b"\r\n") * 1000)
        session = the_session(running)
        await eventually(lambda: session.choked)
        assert len(session._dialogue._replies.owed) <= dialogue_module.MAX_OWED
        look(running, session_module.WRITE_TIMEOUT - SOON)
        assert running.relay.reception._sessions
        look(running, session_module.WRITE_TIMEOUT + SOON)
        await nothing_left(running)
        assert rejects(running, "timeout") == 1
        await counted(running, aborted=1)


# The upstream


async def test_only_so_many_replies_are_owed_at_a_time(start: Any, upstream: ScriptedUpstream) -> None:
    """What is behind them waits as the octets that came, of which there is a bound too."""
    upstream.script = {"RCPT": Silence()}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 250)
        client.send_unread((RCPT + b"\r\n") * 2 * dialogue_module.MAX_OWED)
        dialogue = the_session(running)._dialogue
        await eventually(lambda: dialogue._input.size >= (len(RCPT) + 2) * dialogue_module.MAX_OWED)
        assert len(dialogue._replies.owed) == dialogue_module.MAX_OWED


async def test_to_a_client_that_does_not_read_nothing_more_is_said(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """Also where each command comes alone, and no reply is owed before it."""
    upstream.script = {"RCPT": (b"550-5.1.1 " + b"x" * 4000 + b"\r\n") * 15 + b"550 5.1.1 no\r\n"}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 250)
        client.wire.pause()
        session, command = the_session(running), RCPT + b"\r\n"
        dialogue = session._dialogue

        async def say(count: int) -> None:
            client.send_unread(command)
            await eventually(lambda: len(upstream.log) == 2 + count and not dialogue._replies.owed)

        sent = 0
        while not session.choked:
            sent += 1
            await say(sent)
        client.send_unread(command)
        await eventually(lambda: dialogue._input.size == len(command))
        client.wire.resume()
        assert {reply.code for reply in await client.replies(sent + 1)} == {550}


@pytest.mark.parametrize(("stage", "command"), [("MAIL", MAIL), ("RCPT", RCPT), ("DATA", b"DATA")])
async def test_a_silent_upstream_costs_the_transaction_not_the_session(
    stage: str, command: bytes, start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {stage: [Silence()]}
    async with start(upstream.port) as running, Client(running.port) as client:
        look(
            running, IDLE - SOON
        )  # nothing lies idle: what fails at MAIL on a new connection is not replaced
        await upstream.wait_for(lambda: not upstream.open_connections)
        await client.ehlo()
        for each in (MAIL, RCPT, b"DATA"):
            if each == command:
                break
            await client.command(each, 250)
        await client.send(command + b"\r\n")
        await upstream.wait_for(lambda: upstream.log[-1].line == command)
        look(running, REPLY - SOON)
        assert outcomes(running) == {}
        look(running, REPLY + SOON)
        assert (await client.expect(451)).text.startswith("4.4.2 ")
        await client.command("RSET", 250)
        await counted(running, unavailable=1)
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250


async def test_each_reply_has_the_whole_limit_for_itself(start: Any, upstream: ScriptedUpstream) -> None:
    """Pipelined commands are answered one after the other: the clock of each begins with its turn."""
    answers = [asyncio.Event(), asyncio.Event()]
    upstream.script = {"MAIL": Delay(answers[0]), "RCPT": Delay(answers[1])}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.send(MAIL + b"\r\n" + RCPT + b"\r\n")
        await upstream.wait_for(lambda: upstream.connections[0].lines[-1] == MAIL)
        sent = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)  # the longer it were, the clearer
        answers[0].set()
        await client.expect(250)
        look(running, REPLY - (asyncio.get_running_loop().time() - sent) + 0.01)
        answers[1].set()
        await client.expect(250)


async def test_the_verdict_has_the_longest_limit(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"end_of_data": [Silence()]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        await client.send(CONTENT + b".\r\n")
        await upstream.message()
        look(running, END_OF_DATA - SOON)
        await client.send(b"NOOP\r\n")  # waits behind the verdict
        look(running, END_OF_DATA + SOON)
        assert (await client.expect(451)).text.startswith("4.4.2 ")
        await client.expect(250)
        assert outcomes(running) == {}, "the verdict may still come"
        now = asyncio.get_running_loop().time()
        running.pool.sweep(now + 2 * END_OF_DATA - SOON)
        assert outcomes(running) == {}
        running.pool.sweep(now + 2 * END_OF_DATA + SOON)
        await counted(running, in_doubt=1)
        assert running.rows() == []
        await client.quit()
        await nothing_left(running)


async def test_what_an_overdue_message_waits_for_says_nothing_of_the_next_one(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """When the upstream takes the rest of the first, the second still waits, on its own connection."""
    upstream.script = {"body": StopReading()}
    assert upstream._server is not None
    upstream._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    limits = {"end_of_data_timeout": "60s"}  # shorter than that of a write
    async with start(upstream.port, upstream=limits) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        dialogue = the_session(running)._dialogue
        (first,) = running.pool._open
        wire = first._transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        text = (b"x" * 998 + b"\r\n") * 40  # less than is read at once, more than the two buffers hold
        await client.send(text + b".\r\n")
        await eventually(lambda: not dialogue.unfinished)
        assert first._paused_since is not None
        look(running, 60.0 + SOON)
        await client.expect(451)
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        sending = asyncio.create_task(client.send(stuff(LARGE) + b".\r\n"))
        await eventually(lambda: dialogue._flow_paused)
        upstream.connections[0].wire.resume()
        await upstream.message()
        assert first._paused_since is None
        assert dialogue._flow_paused
        assert dialogue._holding
        upstream.connections[1].wire.resume()
        await sending
        await client.expect(250)
        assert [message.content for message in upstream.messages] == [text, LARGE]
        await counted(running, accepted=2)


async def test_a_verdict_within_its_limit_is_given_to_the_client(
    start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": Delay(answer)}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        await client.send(CONTENT + b".\r\n")
        await upstream.message()
        look(running, END_OF_DATA - SOON)
        answer.set()
        await client.expect(250)
        (row,) = running.rows()
        assert json.loads(row["data"]) == {"relay": "relay.test"}
        await counted(running, accepted=1)
