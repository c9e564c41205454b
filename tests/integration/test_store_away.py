"""The store is away while mail flows: rows wait in the spool, or new mail is refused; nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

from tests.support.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Running
    from tests.support.upstream import ScriptedUpstream

CONTENT = b"Subject: x\r\n\r\nx\r\n"


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold the write lock, as a backup or somebody's forgotten shell does."""
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


async def send(client: Client) -> int:
    replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
    return replies[-1].code


async def until_rows(running: Running, count: int) -> None:
    async with asyncio.timeout(20):
        while len(running.rows()) < count:
            await asyncio.sleep(0.01)


async def test_mail_flows_on_and_its_rows_come_back_once_and_in_order(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with (
        start(upstream.port, records={"commit_timeout": "100ms"}) as running,
        Client(running.port) as client,
    ):
        await client.greeting()
        await client.ehlo()
        with locked(running.database):
            assert [await send(client) for _ in range(5)] == [250] * 5
            assert running.rows() == []
        await until_rows(running, 5)
        rows = running.rows()
        assert len({row["task_id"] for row in rows}) == 5
        assert [row["sent_at"] for row in rows] == sorted(row["sent_at"] for row in rows)
    assert len(upstream.accepted) == 5


async def test_refuse_turns_new_mail_away_before_anything_is_sent(
    start: Any, upstream: ScriptedUpstream
) -> None:
    records = {"commit_timeout": "100ms", "when_unavailable": "refuse"}
    async with start(upstream.port, records=records) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        with locked(running.database):
            assert await send(client) == 250  # the one that found out: accepted means accepted
            reply = await client.command(b"MAIL FROM:<a@example.test>")
            assert (reply.code, reply.text[:5]) == (451, "4.3.0")
            assert running.relay.readiness()[0] is False
            assert len(upstream.messages) == 1
        await until_rows(running, 1)
        async with asyncio.timeout(20):
            while running.relay.recorder.refusal() is not None:
                await asyncio.sleep(0.01)
        assert await send(client) == 250
        assert running.relay.readiness()[0] is True
    assert len(upstream.accepted) == len(running.rows()) == 2
