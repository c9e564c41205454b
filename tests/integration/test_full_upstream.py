"""An upstream that takes fewer connections than `max_connections`: messages wait for one of those.

It counts the connections that it has and turns away one too many, in the greeting or later in the
handshake, as servers do. Time passes by `pool.sweep`: nothing here waits for a clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from relay.upstream.allowance import PAUSE
from tests.support.client import Client
from tests.support.upstream import TOO_MANY, Close, Delay, Reset, ScriptedUpstream, Silence, at_most
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Running
    from tests.support.upstream import Action, Connection

MAIL = b"MAIL FROM:<a@example.test>"
CONTENT = b"Subject: one\r\n\r\ntext\r\n"
AT_ONCE = 12
PATIENT = {"lease_wait_timeout": "1h"}


async def send(running: Running) -> list[int]:
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        return [reply.code for reply in replies]


async def began(running: Running, client: Client) -> None:
    """Say MAIL, and leave the transaction open."""
    await client.ehlo()
    await client.command(MAIL, 250)


def look(running: Running, seconds: float) -> None:
    """Let the pool look at its connections as if it were so many seconds later."""
    running.pool.sweep(asyncio.get_running_loop().time() + seconds)


def told_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "upstream full"]


@pytest.mark.parametrize(
    ("stage", "reply"),
    [
        ("greeting", TOO_MANY),
        ("greeting", b"450 4.7.1 Not now\r\n"),
        ("EHLO", TOO_MANY),
        ("AUTH", b"432 4.3.2 Concurrent connections limit exceeded\r\n"),
    ],
)
async def test_more_messages_than_connections_wait_for_one(
    stage: str, reply: bytes, start: Any, upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.users = {"relay": "secret"}
    upstream.script = {stage: at_most(upstream, 3, reply), "end_of_data": Delay(0.01)}
    login = {"username": "relay", "password": "secret"}
    async with start(upstream.port, upstream=login | PATIENT) as running:
        told = await asyncio.gather(*(send(running) for _ in range(AT_ONCE)))
        assert told == [[250, 250, 354, 250]] * AT_ONCE
        await counted(running, accepted=AT_ONCE)
        assert len(running.rows()) == len(upstream.accepted) == AT_ONCE
        assert running.metric("upstream_up", upstream="primary") == 1
        name = "auth" if stage == "AUTH" else "protocol" if stage == "EHLO" else "greeting"
        turned_away = running.metric("upstream_connects_total", upstream="primary", outcome=name)
        assert 0 < turned_away < AT_ONCE
        assert running.pool.state(0.0) == "up, takes no more than 3 connections"
        look(running, 0)
        await nothing_left(running)
    *_, last = told_of(capsys)
    assert (last["allowed"], last["max_connections"]) == (3, 20)
    assert reply[:3].decode() in last["reason"]


async def test_nothing_more_is_opened_until_the_pause_is_over(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"greeting": at_most(upstream, 2)}
    async with start(upstream.port, upstream=PATIENT) as running, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(running.port)) for _ in range(6)]
        for client in clients[:2]:
            await began(running, client)
        for client in clients[2:]:
            await client.ehlo()
            await client.send(MAIL + b"\r\n")
        await eventually(lambda: "2 active, 0 idle, 0 connecting, 4 waiting" in repr(running.pool))
        seen = len(upstream.connections)
        look(running, PAUSE - 1)
        assert "0 connecting" in repr(running.pool)
        for tried in range(1, 4):
            look(running, tried * (PAUSE + 1))
            assert "1 connecting, 3 waiting" in repr(running.pool)
            await eventually(lambda: "0 connecting, 4 waiting" in repr(running.pool))
            assert len(upstream.connections) == seen + tried
        upstream.script = {}
        look(running, 4 * (PAUSE + 1))
        for client in clients[2:]:
            await client.expect(250)
        assert "6 active" in repr(running.pool)


async def test_who_waits_is_served_by_what_comes_back(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"greeting": at_most(upstream, 1)}
    async with (
        start(upstream.port, upstream=PATIENT) as running,
        Client(running.port) as holder,
        Client(running.port) as waiter,
    ):
        await began(running, holder)
        await waiter.ehlo()
        await waiter.send(MAIL + b"\r\n")
        await eventually(lambda: "1 active, 0 idle, 0 connecting, 1 waiting" in repr(running.pool))
        await holder.command("RSET", 250)
        await waiter.expect(250)
        assert len(upstream.open_connections) == 1


async def test_who_waits_in_vain_hears_451(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"greeting": at_most(upstream, 1)}
    async with (
        start(upstream.port, upstream={"lease_wait_timeout": "100ms"}) as running,
        Client(running.port) as holder,
        Client(running.port) as waiter,
    ):
        await began(running, holder)
        await waiter.ehlo()
        reply = await waiter.command(MAIL, 451)
        assert str(reply).startswith("451 4.3.2 No connection to the upstream server is free now")
        assert not running.pool.avoided
        assert outcomes(running) == {"unavailable": 1}


def one_at_a_time(upstream: ScriptedUpstream) -> Callable[[str, bytes, Connection], Action | None]:
    """Return how an upstream greets that has one process: connections beside its own stand in the queue."""

    def act(stage: str, line: bytes, connection: Connection) -> Action | None:
        del stage, line
        return None if upstream.open_connections == [connection] else Silence()

    return act


async def test_an_upstream_that_leaves_one_too_many_in_its_queue_is_full(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"greeting": one_at_a_time(upstream)}
    settings = PATIENT | {"connect_timeout": "5s"}
    async with (
        start(upstream.port, upstream=settings) as running,
        Client(running.port) as holder,
        Client(running.port) as waiter,
    ):
        await began(running, holder)
        await waiter.ehlo()
        await waiter.send(MAIL + b"\r\n")
        await eventually(lambda: "1 active, 0 idle, 1 connecting" in repr(running.pool))
        await holder.command("RSET", 250)
        await waiter.expect(250)
        assert running.metric("upstream_up", upstream="primary") == 1
        assert running.metric("upstream_connects_total", upstream="primary", outcome="timeout") == 1
        assert running.pool.state(0.0) == "up, takes no more than 1 connections"
        assert "unavailable" not in outcomes(running)


async def test_silence_where_nothing_is_answered_is_a_failure(start: Any, upstream: ScriptedUpstream) -> None:
    """It may hang altogether, and another upstream should have the messages."""
    async with (
        start(upstream.port, upstream=PATIENT | {"connect_timeout": "100ms"}) as running,
        Client(running.port) as holder,
        Client(running.port) as other,
    ):
        await began(running, holder)
        upstream.script = {"greeting": Silence()}
        await other.ehlo()
        await other.command(MAIL, 451)
        assert running.metric("upstream_up", upstream="primary") == 0
        assert running.pool.state(0.0).startswith("down: ")


async def test_an_upstream_that_turns_away_the_only_one_is_down(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"greeting": at_most(upstream, 0)}
    async with start(upstream.port, upstream=PATIENT) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 451)
        assert running.metric("upstream_up", upstream="primary") == 0
        assert running.pool.state(0.0).startswith("down: ")


@pytest.mark.parametrize("how", [Reset(), Close(), Close(b"554 5.3.2 No mail here\r\n")])
async def test_what_is_no_such_reply_is_a_failure(
    how: Action, start: Any, upstream: ScriptedUpstream
) -> None:
    """That others stand is then no reason to wait: it may be about to go."""
    async with (
        start(upstream.port, upstream=PATIENT) as running,
        Client(running.port) as holder,
        Client(running.port) as other,
    ):
        await began(running, holder)
        upstream.script = {"greeting": how}
        await other.ehlo()
        await other.command(MAIL, 451)
