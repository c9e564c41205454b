"""Two relays, processes of their own, that share a port and a SQLite file, each with a spool of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from relay import bookkeeping
from relay.records.agreement import Agreement
from relay.records.retention import Retention
from relay.records.store import open_store, utc_now
from tests.support.client import Client
from tests.support.databases import SqliteDatabase, locked
from tests.support.process import RelayProcess
from tests.support.rows import make_record
from tests.support.watch import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.upstream import ScriptedUpstream

OLD_ROWS = 40
DAY_AGO = "datetime('now', '-1 days')"
BOUND_S = 40.0


class Pair:
    """The relays, their port and their file."""

    def __init__(self, relays: list[RelayProcess], port: int, database: SqliteDatabase) -> None:
        self.relays = relays
        self.port = port
        self.database = database


@pytest.fixture
async def pair(tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Pair]:
    """Two relays that are not started, on a file with rows that have expired."""
    database = SqliteDatabase(tmp_path / "rows.db")
    store = await open_store(database.url, Retention(timedelta(days=30)))
    await store.write([make_record(sent_at=datetime.now(UTC) - timedelta(days=40)) for _ in range(OLD_ROWS)])
    await store.follow_retention()
    await store.close()
    async with contextlib.AsyncExitStack() as stack:
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        relays = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            over: dict[str, Any] = {
                "server": {"reuse_port": True, "hostname": f"{name}.test"},
                "records": {"url": database.url},
                "listener": {"address": f"127.0.0.1:{port}"},
                "expiry": {"interval": "1s"},
            }
            relay = RelayProcess(tmp_path / name, upstream.port, **over)
            relays.append(await stack.enter_async_context(relay))
        yield Pair(relays, port, database)


async def test_every_250_has_its_row_and_each_expired_row_goes_once(
    pair: Pair, upstream: ScriptedUpstream
) -> None:
    await asyncio.gather(*(relay.start() for relay in pair.relays))
    told: list[str] = []

    async def client(number: int) -> None:
        """Send now and then on a new connection, since it is the connection that finds a relay."""
        for turn in range(4):
            async with Client(pair.port) as session:
                await session.greeting()
                await session.ehlo()
                sender = f"{number}-{turn}@example.com"
                replies = await session.message(sender, ["b@example.test"], b"Subject: x\r\n\r\nx\r\n")
                assert replies[-1].code == 250
                told.append(sender)
                await session.quit()

    await asyncio.gather(*(client(number) for number in range(12)))
    extra = 0
    writers = f"SELECT DISTINCT json_extract(data, '$.relay') FROM task_done WHERE sent_at > {DAY_AGO}"
    while len(pair.database.rows(writers)) < 2:  # chance decides who serves
        extra += 1
        assert extra < 50
        await client(1000 + extra)
    async with asyncio.timeout(BOUND_S):
        while pair.database.rows(f"SELECT 1 FROM task_done WHERE sent_at < {DAY_AGO} LIMIT 1"):
            await asyncio.sleep(0.05)
    expired = 0.0
    for relay in pair.relays:
        expired += await relay.metric("expired_rows_total")
    assert expired == OLD_ROWS  # none of them twice
    for relay in pair.relays:
        assert await relay.metric("records_spooled") == 0
        assert await relay.terminate() == 0
        assert relay.errors() == ""
    assert sorted(sender for (sender,) in pair.database.rows("SELECT sender FROM task_done")) == sorted(told)
    assert len(upstream.accepted) == len(told)


async def test_a_spool_belongs_to_one_relay(pair: Pair) -> None:
    first, second = pair.relays
    await first.start()
    second.write(second.config.read_text().replace(str(second.spool), str(first.spool)))
    await second.spawn()
    assert await second.ended() == 1
    (said,) = second.errors().splitlines()
    assert said.startswith("relay: cannot start: ")
    assert f"{first.spool} is in use by another process: give each its own" in said
    assert (await first.get("/readyz"))[0] == 200


async def test_no_row_is_deleted_before_the_others_are_heard(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The store answers only once the relay has started; another one keeps rows for ever."""
    database = SqliteDatabase(tmp_path / "rows.db")
    store = await open_store(database.url, Retention(None))
    other = Agreement(store, "other", Retention(None), clock=utc_now, on_differ=lambda _: None)
    await other.reach()
    await store.write([make_record(sent_at=datetime.now(UTC) - timedelta(days=2))])
    await store.follow_retention()
    await store.close()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(database.path))
        async with start(upstream.port, retention={"default": "1d"}) as running:
            stack.close()
            await eventually(lambda: running.metric("expiry_last_run_timestamp_seconds"))
            assert len(running.rows()) == 1


async def test_rows_of_who_has_not_heard_yet_follow_the_longer_retention_too(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another relay has made all rows follow its longer retention, and then comes one more of this relay."""
    monkeypatch.setattr(bookkeeping, "AGAIN_S", 0.1)
    database = SqliteDatabase(tmp_path / "rows.db")
    longer = Retention(timedelta(days=30))
    async with start(upstream.port, retention={"default": "1d"}) as running, Client(running.port) as client:
        store = await open_store(database.url, longer)
        await store.follow_retention()
        await client.greeting()
        await client.ehlo()
        replies = await client.message("a@example.com", ["b@example.test"], b"Subject: x\r\n\r\nx\r\n")
        assert replies[-1].code == 250
        await Agreement(store, "other", longer, clock=utc_now, on_differ=lambda _: None).reach()
        await store.close()
        kept = "SELECT julianday(expires_at) - julianday(sent_at) AS days FROM task_done"
        await eventually(lambda: round(running.rows(kept)[0]["days"]) == 30)
