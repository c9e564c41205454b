"""What each side was waited for: the time of a transaction is divided between them, in the metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.several import configured
from tests.support.upstream import Close, Delay, ScriptedUpstream
from tests.support.watch import counted, eventually

WAIT_S = 0.2


def waits(running: Any) -> dict[str, float]:
    return {
        whom: running.metric("transaction_wait_seconds_total", upstream="primary", waited_for=whom)
        for whom in ("client", "connection", "upstream", "record")
    }


async def test_the_time_that_each_side_takes_is_its_own(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"RCPT": Delay(WAIT_S), "end_of_data": Delay(WAIT_S)}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<a@example.test>", 250)
        await asyncio.sleep(WAIT_S)
        await client.command("RCPT TO:<b@example.test>", 250)
        await client.command("DATA", 354)
        await asyncio.sleep(2 * WAIT_S)
        await client.send(b"text\r\n.\r\n")
        await client.expect(250)
        await counted(running, accepted=1)
        found = waits(running)
        total = running.metric("transaction_seconds_sum", upstream="primary")

    assert found["client"] >= 3 * WAIT_S * 0.99
    assert found["upstream"] >= 2 * WAIT_S * 0.99
    assert found["record"] > 0
    assert sum(found.values()) == pytest.approx(total)


async def test_an_upstream_that_is_lost_was_waited_for_until_then(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"RCPT": Delay(60.0)}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<a@example.test>", 250)
        client.send_unread(b"RCPT TO:<b@example.test>\r\n")
        await asyncio.sleep(WAIT_S)
        upstream.connections[0].wire.abort()
        await client.expect(451)
        await client.command("QUIT", 221)
        await counted(running, unavailable=1)
        found = waits(running)

    assert found["upstream"] >= WAIT_S * 0.9


async def test_what_is_noted_for_a_scrape_does_not_wait_for_one(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.message("a@example.test", ["b@example.test"], b"text\r\n")
        primary = running.relay.metrics.upstreams["primary"]
        async with asyncio.timeout(10):
            while not any(primary.counts().answers):
                await asyncio.sleep(0.05)
        assert sum(primary.counts().outcomes) == 1
        assert not primary._finished


async def test_each_upstream_that_is_tried_has_its_own_part(start: Any) -> None:
    """One that is lost before it has answered MAIL was waited for, and no connection meanwhile."""
    async with ScriptedUpstream() as lost, ScriptedUpstream() as other:
        lost.script = {"MAIL": Delay(WAIT_S, Close())}
        upstreams = [configured("lost", lost, priority=1), configured("primary", other)]
        async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
            await client.ehlo()
            await client.message("a@example.test", ["b@example.test"], b"text\r\n")
            await counted(running, accepted=1)
            found = waits(running)
            total = running.metric("transaction_seconds_sum", upstream="primary")

    assert found["upstream"] >= 2 * WAIT_S * 0.99, "the connection of the start, and a new one"
    assert sum(found.values()) == pytest.approx(total)


async def test_a_connection_that_cannot_be_had_was_waited_for(start: Any) -> None:
    async with ScriptedUpstream() as upstream:
        only = configured("primary", upstream, max_connections=1, lease_wait_timeout="200ms")
        async with start(0, upstreams=[only]) as running, Client(running.port) as first:
            await first.ehlo()
            await first.command("MAIL FROM:<a@example.test>", 250)
            async with Client(running.port) as second:
                await second.ehlo()
                await second.command("MAIL FROM:<a@example.test>", 451)
                await second.command("QUIT", 221)
            await counted(running, unavailable=1)
            found = waits(running)
            total = running.metric("transaction_seconds_sum", upstream="primary")

    assert found["connection"] >= WAIT_S * 0.99
    assert sum(found.values()) == pytest.approx(total)


async def test_a_wait_that_ends_with_a_connection_is_seen_in_both_metrics(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with (
        start(upstream.port, upstream={"max_connections": 1}) as running,
        Client(running.port) as first,
    ):
        await first.ehlo()
        await first.command("MAIL FROM:<a@example.test>", 250)
        async with Client(running.port) as second:
            await second.ehlo()
            second.send_unread(b"MAIL FROM:<a@example.test>\r\n")
            await eventually(lambda: "1 waiting" in repr(running.pool))
            await first.command("RSET", 250)
            await second.expect(250)
            await second.command("RSET", 250)
        await counted(running, aborted=2)
        found = waits(running)
        waited = running.metric("upstream_wait_seconds_sum", upstream="primary")

    assert waited > 0
    assert found["connection"] == pytest.approx(waited)


async def test_a_client_that_has_not_named_a_recipient_yet_does_not_wait_for_a_connection(start: Any) -> None:
    """Where it takes the recipient to know the upstream."""
    async with ScriptedUpstream() as upstream:
        only = configured("primary", upstream, match={"recipient_domain": ["example.test"]})
        async with start(0, upstreams=[only]) as running, Client(running.port) as client:
            await client.ehlo()
            await client.command("MAIL FROM:<a@example.test>", 250)
            await asyncio.sleep(WAIT_S)
            await client.command("RCPT TO:<b@example.test>", 250)
            await client.command("RSET", 250)
            await counted(running, aborted=1)
            found = waits(running)
            waited = running.metric("upstream_wait_seconds_sum", upstream="primary")

    assert found["client"] >= WAIT_S * 0.99
    assert found["connection"] < WAIT_S
    assert waited < WAIT_S
