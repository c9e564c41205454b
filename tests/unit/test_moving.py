"""From one store to another: all of it, once, whatever was there before, however often it is cut short."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from relay.records.model import Doubt, Record
from relay.records.moving import BATCH, count_all, move
from relay.records.queries import open_queries
from relay.records.retention import Retention
from relay.records.sends import SendFilter
from relay.records.store import open_store
from tests.support.databases import SqliteDatabase

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
MONTH = Retention(timedelta(days=30))
COUNT = 2 * BATCH + 7
COLUMNS = (
    "task_id, client_task_id, task_type, sender, sender_domain, client, sent_at, expires_at, upstream, "
    "upstream_reply, message_id, size, duration_ms"
)
ALL = (
    f"SELECT {COLUMNS}, ordinal, recipient, recipient_domain FROM task_done_send ORDER BY task_id, ordinal",
    "SELECT task_id, task_type, client, since, expires_at, reason, size FROM task_in_doubt ORDER BY task_id",
)
COMMAND = (sys.executable, "-m", "relay", "migrate-store")
DATA = {"tags": ["ü"], "relay": "old"}


def record(number, **changes):
    values = {
        "task_id": UUID(int=number),
        "task_type": "mention",
        "sender": "Alice@Example.COM",
        "client": "127.0.0.1",
        "sent_at": NOW + timedelta(seconds=number),
        "upstream": "primary",
        "upstream_reply": "250 2.0.0 Ok",
        "size": 4096,
        "duration_ms": 12,
        "recipients": ("bob@example.net", "Carol@Example.org"),
        "data": DATA,
    }
    return Record(**(values | changes))


def doubt(number):
    return Doubt(UUID(int=number), "mention", "a@x", "c", NOW, "primary", "lost", 1, 2, ("b@y",), data=DATA)


@pytest.fixture(params=["to postgres", "to sqlite"])
async def ways(request, tmp_path, postgres_database):
    """The old store, with something in it, and the new one."""
    file = SqliteDatabase(tmp_path / "t.db")
    old, new = (file, postgres_database) if request.param == "to postgres" else (postgres_database, file)
    store = await open_store(old.url, MONTH)
    for begin in range(1, COUNT + 1, 500):
        await store.write([record(number) for number in range(begin, min(begin + 500, COUNT + 1))])
    await store.write([doubt(5000), doubt(5001)])
    await store.close()
    return old, new


async def carry(old, new, on_progress=lambda done: None, count=COUNT):
    source = await open_queries(old.url)
    store = await open_store(new.url, MONTH)
    there = await open_queries(new.url)
    try:
        assert await count_all(source) == count + 2
        return await move(source, store, there, on_progress)
    finally:
        await there.close()
        await store.close()
        await source.close()


async def test_everything_is_there_afterwards(ways):
    old, new = ways
    progress = []
    moved = await carry(old, new, progress.append)
    assert (moved.sends, moved.recipients, moved.in_doubt, moved.rejected) == (COUNT, 2 * COUNT, 2, [])
    assert progress == [500, 1000, COUNT, COUNT + 2]
    for query in ALL:
        assert new.rows(query) == old.rows(query)
    found = await open_queries(new.url)
    assert all([send.data == DATA async for page in found.sends(SendFilter()) for send in page])
    await found.close()


async def test_cut_short_it_is_begun_again_and_rows_that_came_meanwhile_stay(ways):
    old, new = ways

    class CutError(Exception):
        pass

    def cut(done):
        if done >= 1000:
            raise CutError

    with pytest.raises(CutError):
        await carry(old, new, cut)
    assert new.rows("SELECT count(*) FROM task_done") == [(1000,)]
    store = await open_store(new.url, MONTH)
    await store.write([record(9000)])  # a relay works on the new store already
    await store.close()
    moved = await carry(old, new)
    assert (moved.sends, moved.in_doubt) == (COUNT, 2)
    assert new.rows("SELECT count(*) FROM task_done") == [(COUNT + 1,)]
    assert new.rows("SELECT count(*) FROM task_done_recipient") == [(2 * COUNT + 2,)]


async def test_what_was_in_doubt_and_is_accepted_when_it_is_run_again_is_so_there(ways):
    old, new = ways
    await carry(old, new)
    store = await open_store(old.url, MONTH)
    await store.write([record(5000, doubted=True), doubt(5002)])
    await store.close()
    moved = await carry(old, new, count=COUNT + 1)
    assert (moved.sends, moved.in_doubt) == (COUNT + 1, 2)
    for query in ALL:
        assert new.rows(query) == old.rows(query)


async def test_a_row_that_the_new_store_never_takes_is_named_and_the_rest_goes(tmp_path, postgres_database):
    old = SqliteDatabase(tmp_path / "t.db")
    store = await open_store(old.url, MONTH)
    await store.write([record(1), record(2), record(3)])
    await store.close()
    old.execute("UPDATE task_done SET sender = 'a' || char(0) || 'b@x' WHERE id = 2")
    source, there = await open_queries(old.url), await open_queries(postgres_database.url)
    store = await open_store(postgres_database.url, MONTH)
    moved = await move(source, store, there, lambda done: None)
    for each in (source, there, store):
        await each.close()
    assert (moved.sends, moved.recipients) == (2, 4)
    [(task_id, reason)] = moved.rejected
    assert task_id == str(UUID(int=2))
    assert "Unicode escape" in reason


def test_the_command(ways, tmp_path):
    old, new = ways
    config = tmp_path / "relay.toml"
    config.write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')

    def command(source, target):
        return subprocess.run(
            [*COMMAND, "--config", config, "--from", source, "--to", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    for _ in range(2):  # again: nothing changes
        done = command(old.url, new.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (
            f"{COUNT} sends with {2 * COUNT} recipients and 2 messages in doubt of the old store are in the "
            "new one\n"
        )
        assert new.rows("SELECT count(*) FROM task_done") == [(COUNT,)]
    done = command(f"sqlite:///{tmp_path}/nowhere.db", new.url)
    assert done.returncode == 1
    assert "no such file" in done.stderr
    assert not (tmp_path / "nowhere.db").exists()
    assert command(old.url, old.url).returncode == 2
