"""No client keeps another one out of a pool that is too small for both, however many sessions it opens.

Time passes by `reception.sweep`: nothing here waits for a clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from relay.session import content, dialogue
from tests.support.client import Client
from tests.support.upstream import at_most
from tests.support.watch import counted, eventually, nothing_left

if TYPE_CHECKING:
    from tests.conftest import Running
    from tests.support.upstream import ScriptedUpstream

MAIL = b"MAIL FROM:<a@example.test>"
RCPT = b"RCPT TO:<b@example.test>"
CONTENT = b"Subject: one\r\n\r\ntext\r\n"
FLOOD = 20
SMALL = {"max_connections": 4, "lease_wait_timeout": "1h"}


def pass_time(running: Running, seconds: float) -> None:
    """Let the relay look at its sessions as if it were so many seconds later."""
    running.relay.reception.sweep(asyncio.get_running_loop().time() + seconds, seconds)


def waiting(running: Running, count: int) -> bool:
    return f" {count} waiting" in repr(running.pool)


async def flood(running: Running, stack: contextlib.AsyncExitStack) -> tuple[list[Client], list[Client]]:
    """Say MAIL in many sessions from one address; return all, and those that have a connection."""
    clients = [
        await stack.enter_async_context(Client(running.port, source="127.0.0.2")) for _ in range(FLOOD)
    ]
    for client in clients:
        await client.ehlo()
        await client.send(MAIL + b"\r\n")
    await eventually(lambda: waiting(running, FLOOD - 4), lambda: running.pool)
    await eventually(lambda: sum(bool(client.wire.waiting) for client in clients) == 4)
    held = [client for client in clients if client.wire.waiting]
    for client in held:
        await client.expect(250)
    return clients, held


async def other(running: Running) -> None:
    """Send one message from another address."""
    async with Client(running.port, source="127.0.0.3") as client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]


@pytest.mark.parametrize("most", [4, 20], ids=["by its settings", "by what the upstream takes"])
async def test_silent_sessions_of_one_client_do_not_keep_another_out(
    most: int, start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"greeting": at_most(upstream, 4)}
    small = SMALL | {"max_connections": most}
    async with start(upstream.port, upstream=small) as running, contextlib.AsyncExitStack() as stack:
        clients, held = await flood(running, stack)
        pass_time(running, dialogue.CONTESTED_SILENCE + 1)
        assert waiting(running, FLOOD - 4), "nobody else waits: the flood is among itself"
        sending = asyncio.create_task(other(running))
        await eventually(lambda: waiting(running, FLOOD - 3))
        pass_time(running, dialogue.CONTESTED_SILENCE - 1)
        assert not sending.done()
        pass_time(running, dialogue.CONTESTED_SILENCE + 1)
        await sending
        lost = 0
        for client in held:
            reply = await client.command(RCPT)
            lost += reply.code == 451 and reply.text.startswith("4.4.2 ")
        assert lost == 2, "the flood has lost what is more than its half, and no more"
        for client in clients:
            client.wire.abort()
        await nothing_left(running)


async def test_slow_content_of_one_client_does_not_keep_another_out(
    start: Any, upstream: ScriptedUpstream
) -> None:
    server = {"min_data_rate": "500B"}
    async with (
        start(upstream.port, upstream=SMALL, server=server) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [
            await stack.enter_async_context(Client(running.port, source="127.0.0.2")) for _ in range(4)
        ]
        for client in clients:
            await client.ehlo()
            for line in (MAIL, RCPT):
                await client.command(line, 250)
            await client.command("DATA", 354)
            await client.send(b"x" * 60 + b"\r\n")
        pass_time(running, content.CONTESTED_GRACE + 1)
        sending = asyncio.create_task(other(running))
        await eventually(lambda: waiting(running, 1))
        pass_time(running, content.CONTESTED_GRACE - 4)
        assert not sending.done()
        # They have just moved: it is the rate that ends them, not silence.
        for session in running.relay.reception._sessions:
            session._dialogue._content._began -= content.CONTESTED_GRACE + 1
        pass_time(running, 0)
        await sending
        ended = [client for client in clients if client.wire.waiting]
        assert len(ended) == 1, "nobody waits any more"
        assert (await ended[0].reply()).raw == b"421 4.4.2 The message comes too slowly; closing\r\n"
        assert running.metric("client_rejects_total", reason="slow") == 1


async def test_content_that_comes_fast_enough_is_not_ended(start: Any, upstream: ScriptedUpstream) -> None:
    async with (
        start(upstream.port, upstream={**SMALL, "max_connections": 2}) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(Client(running.port, source="127.0.0.2")) for _ in "12"]
        for client in clients:
            await client.ehlo()
            for line in (MAIL, RCPT):
                await client.command(line, 250)
            await client.command("DATA", 354)
            await client.send((b"x" * 998 + b"\r\n") * 60)
        sessions = running.relay.reception._sessions
        await eventually(
            lambda: all(each._dialogue._transaction.body.received == 60_000 for each in sessions)
        )
        sending = asyncio.create_task(other(running))
        await eventually(lambda: waiting(running, 1))
        for session in sessions:
            session._dialogue._content._began -= 11
        pass_time(running, 0)
        assert not sending.done(), "60,000 octets in 11 s are more than 5,000 a second"
        for client in clients:
            assert (await client.command(b".")).code == 250
        await sending
        await counted(running, accepted=3)


async def test_a_client_that_holds_nothing_is_next_however_many_wait_before_it(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, upstream=SMALL) as running, contextlib.AsyncExitStack() as stack:
        clients, held = await flood(running, stack)
        few = await stack.enter_async_context(Client(running.port, source="127.0.0.3"))
        await few.ehlo()
        await few.send(MAIL + b"\r\n")
        await eventually(lambda: waiting(running, FLOOD - 3))
        await held[0].command("RSET", 250)
        await few.expect(250)
        assert sum(bool(client.wire.waiting) for client in clients) == 0
        await held[1].command("RSET", 250)
        await eventually(lambda: sum(bool(client.wire.waiting) for client in clients) == 1)
