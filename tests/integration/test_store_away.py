"""The store is away while mail flows: rows wait in the spool, or new mail is refused; nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from relay.records import spooler as spooler_module
from relay.records.sqlite.store import SqliteStore
from tests.support.client import Client
from tests.support.databases import locked
from tests.support.upstream import CHUNKING, Close
from tests.support.watch import eventually

if TYPE_CHECKING:
    from tests.conftest import Running
    from tests.support.upstream import ScriptedUpstream

CONTENT = b"Subject: x\r\n\r\nx\r\n"


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


async def test_a_stop_asks_nothing_of_a_store_that_is_away(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of limits and retention runs out; to take it back would be one more long wait."""
    taken_back: list[str] = []
    say_gone = SqliteStore.say_gone

    async def noted(store: SqliteStore, name: str) -> None:
        taken_back.append(name)
        await say_gone(store, name)

    monkeypatch.setattr(SqliteStore, "say_gone", noted)
    limits = [{"scope": "sender", "max": 100, "per": "1h"}]
    with contextlib.ExitStack() as stack:
        over = {"records": {"commit_timeout": "100ms"}, "limits": limits}
        async with start(upstream.port, **over) as running, Client(running.port) as client:
            await client.ehlo()
            stack.enter_context(locked(running.database))
            assert await send(client) == 250
        assert taken_back == []
    async with start(upstream.port, limits=limits) as running:
        await until_rows(running, 1)
        await eventually(lambda: running.relay.records.recorder.away() is None)
    assert sorted(name.partition(":")[0] for name in taken_back) == ["relay", "retention"]


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
            while running.relay.records.recorder.refusal() is not None:
                await asyncio.sleep(0.01)
        assert await send(client) == 250
        assert running.relay.readiness()[0] is True
    assert len(upstream.accepted) == len(running.rows()) == 2


SLOW = """
    CREATE TRIGGER slow AFTER INSERT ON task_done BEGIN
        SELECT count(*) FROM (
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000) SELECT i FROM n
        );
    END
"""


async def test_refuse_ends_though_the_last_commit_was_too_slow(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """No row comes that would show that the store is quick again, since all mail is refused."""
    records = {"commit_timeout": "100ms", "when_unavailable": "refuse"}
    async with (
        start(upstream.port, records=records) as running,
        Client(running.port) as client,
        Client(running.port) as other,
        contextlib.AsyncExitStack() as stack,
    ):
        for each in (client, other):
            await each.greeting()
            await each.ehlo()
        raw = stack.enter_context(contextlib.closing(sqlite3.connect(running.database)))
        raw.execute(SLOW)
        assert (await other.command(b"MAIL FROM:<a@example.test>")).code == 250
        assert await send(client) == 250
        assert (await other.command(b"RCPT TO:<b@example.test>")).code == 250
        assert (await other.command(b"DATA")).code == 354
        assert (await other.command(CONTENT + b".")).code == 250  # its row is the replay's, and slow
        await until_rows(running, 2)
        raw.execute("DROP TRIGGER slow")
        await eventually(lambda: running.relay.records.recorder.refusal() is None)
        assert await send(client) == 250
        assert running.relay.records.recorder.away() is None
    assert len(upstream.accepted) == 3


@pytest.mark.parametrize("chunks", [False, True])
async def test_no_place_for_the_row_and_nothing_is_sent(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, chunks: bool
) -> None:
    """The reserve is used up while the content comes: the end of data does not go up."""
    monkeypatch.setattr(spooler_module, "_LARGEST_RESERVE", 0)  # it does not grow
    upstream.extensions += CHUNKING
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        recorder = running.relay.records.recorder
        all_of_it = int(running.metric("records_reserve_bytes"))
        assert recorder.promise(all_of_it)
        if chunks:
            replies = await client.chunks(
                b"a@example.test", [b"b@example.test"], [b"Subject: x\r\n", b"\r\nx\r\n"]
            )
        else:
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert str(replies[-1]) == (
            "451 4.3.0 The relay cannot keep the record of this message now, try again later"
        )
        assert running.metric("client_rejects_total", reason="records") == 1
        assert running.metric("messages_total", upstream="none", outcome="refused") == 1
        await upstream.wait_for(lambda: not upstream.open_connections)
        assert upstream.messages == []

        recorder.release(all_of_it)
        assert await send(client) == 250
        assert recorder.promise(all_of_it)  # the message has given its place back
    assert len(upstream.accepted) == len(running.rows()) == 1


async def test_every_outcome_gives_its_place_back(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooler_module, "_LARGEST_RESERVE", 0)  # it does not grow
    verdicts = [b"250 ok\r\n", b"451 4.3.0 later\r\n", b"550 5.7.1 no\r\n", Close(), b"421 4.3.2 bye\r\n"]
    upstream.script = {"end_of_data": list(verdicts)}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        assert [await send(client) for _ in verdicts] == [250, 451, 550, 451, 451]
        all_of_it = int(running.metric("records_reserve_bytes"))
        async with asyncio.timeout(20):  # the client may hear a little earlier
            while not running.relay.records.recorder.promise(all_of_it):
                await asyncio.sleep(0.01)


async def test_rows_that_wait_are_no_full_disk(start: Any, upstream: ScriptedUpstream) -> None:
    """Of the reserve rows use up a quarter before it is made up for: the alert's threshold is below that."""
    alerts = (Path(__file__).parents[2] / "config/prometheus/relay.alerts.yml").read_text()
    (threshold,) = re.findall(r"smtp_relay_records_reserve_bytes\[5m\]\) < ([0-9]+)", alerts)
    recipients = [f"{number:060}@{'x' * 60}.example.test" for number in range(100)]
    records = {"commit_timeout": "100ms"}
    async with start(upstream.port, records=records) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        whole = running.metric("records_reserve_bytes")
        with locked(running.database):
            lowest = whole
            for _ in range(40):
                replies = await client.message("a@example.test", recipients, CONTENT, pipelined=True)
                assert replies[-1].code == 250
                await eventually(lambda: running.metric("records_reserve_bytes") >= int(threshold))
                lowest = min(lowest, running.metric("records_reserve_bytes"))
        assert lowest < 0.9 * whole


async def test_a_message_larger_than_the_reserve_has_it_grow(start: Any, upstream: ScriptedUpstream) -> None:
    """A thousand long refusals: the row is as long as all of them, and is refused once at most."""
    refusal = b"550 5.1.1 " + b"no such user, " * 200 + b"\r\n"
    upstream.script = {"RCPT": {"<u": refusal}}
    recipients = ["good@example.test", *(f"u{number}@example.test" for number in range(900))]
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        before = running.metric("records_reserve_bytes")
        for code in (451, 250):
            replies = await client.message("a@example.test", recipients, CONTENT, pipelined=True)
            assert replies[-1].code == code
            async with asyncio.timeout(20):
                while running.metric("records_reserve_bytes") == before:
                    await asyncio.sleep(0.01)
        assert len(running.rows()) == 1


@pytest.mark.parametrize("instead", ["nothing", "another file", "a directory"])
async def test_the_store_is_swapped_away_under_the_relay(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path, instead: str
) -> None:
    """Rows do not go to a file that nobody can find; they come back with it."""
    away = tmp_path / "away"
    away.mkdir()
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        assert await send(client) == 250
        taken = sorted(tmp_path.glob("rows.db*"))
        for path in taken:
            path.rename(away / path.name)
        if instead == "another file":
            running.database.write_bytes(b"")
        elif instead == "a directory":
            running.database.mkdir()
        assert [await send(client) for _ in range(3)] == [250] * 3
        assert running.metric("records_spooled") == 3
        assert running.relay.readiness()[0] is True

        if instead == "another file":
            assert running.database.read_bytes() == b""
            running.database.unlink()
        elif instead == "a directory":
            running.database.rmdir()
        for path in taken:
            (away / path.name).rename(path)
        await until_rows(running, 4)


async def test_the_store_can_only_be_read_for_a_while(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        database = running.relay.records.store._database
        await database.run(lambda raw: raw.execute("PRAGMA query_only = 1"))
        assert [await send(client) for _ in range(3)] == [250] * 3
        assert running.rows() == []
        assert running.metric("records_spooled") == 3
        await database.run(lambda raw: raw.execute("PRAGMA query_only = 0"))
        await until_rows(running, 3)
        assert not (running.relay.records.recorder._spooler._spool.rejected_file).exists()


async def test_the_directory_of_the_spool_is_removed_under_the_relay(
    start: Any, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill would leave nothing of a message under way, so none is begun; the one that is goes on."""
    async with start(upstream.port) as running, Client(running.port) as client, Client(running.port) as other:
        for each in (client, other):
            await each.greeting()
            await each.ehlo()
        assert (await other.command(b"MAIL FROM:<a@example.test>")).code == 250
        directory = running.relay.records.spool.directory
        assert running.relay.readiness()[0] is True
        shutil.rmtree(directory)

        await eventually(lambda: not running.relay.readiness()[0])
        reason = f"{directory}/journal: was removed while it was in use; restart the relay"
        assert f"records cannot be kept: {reason}" in running.relay.readiness()[1]
        assert str(await client.command(b"MAIL FROM:<a@example.test>")) == (
            "451 4.3.0 The relay cannot keep its records now, try again later"
        )
        assert (await other.command(b"RCPT TO:<b@example.test>")).code == 250
        assert (await other.command(b"DATA")).code == 354
        assert (await other.command(CONTENT + b".")).code == 250
    assert [record.message for record in caplog.records].count(reason) == 1
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        assert await send(client) == 250
        assert len(upstream.accepted) == len(running.rows()) == 2
