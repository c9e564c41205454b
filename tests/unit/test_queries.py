from __future__ import annotations

import itertools
import os
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy.dialects import postgresql, sqlite

from relay.records import queries
from relay.records.errors import StoreError
from relay.records.migrations import upgrade
from relay.records.model import Doubt, Record
from relay.records.queries import PAGE_ROWS, open_queries
from relay.records.retention import Retention
from relay.records.search import page_of_doubts, page_of_sends, recipients_of
from relay.records.sends import SendFilter
from relay.records.sqlite import reader as reader_module
from relay.records.sqlite.hints import heed_hints
from relay.records.store import open_store
from relay.records.tables import COLUMNS, SCHEMA_VERSIONS, VERSION_TABLE

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="Alice@Example.COM",
    client="127.0.0.1",
    sent_at=NOW,
    upstream="primary",
    upstream_reply="250 2.0.0 Ok: queued as 4F3A",
    size=4096,
    duration_ms=12,
    recipients=("bob@example.net",),
    message_id="<1@example.com>",
    data={"tags": ["a"]},
)


def row(number, **changes):
    """A row `number` seconds after NOW."""
    return replace(ROW, task_id=UUID(int=number), sent_at=NOW + timedelta(seconds=number), **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.db"


@pytest.fixture(autouse=True)
async def readers(monkeypatch):
    """Closes what a test has opened to read."""
    opened = []

    async def opening(url):
        opened.append(await queries.open_queries(url))
        return opened[-1]

    monkeypatch.setitem(globals(), "open_queries", opening)
    yield
    for each in opened:
        await each.close()


def url_of(place):
    return place.url if hasattr(place, "url") else f"sqlite:///{place}"


async def write(place, *rows):
    store = await open_store(url_of(place), Retention(timedelta(days=30)))
    await store.write(rows)
    await store.close()


async def found(place, limit=None, **wanted):
    """The rows, by their number."""
    opened = await open_queries(url_of(place))
    pages = [page async for page in opened.sends(SendFilter(**wanted), limit=limit)]
    return [UUID(send.task_id).int for page in pages for send in page]


def names_in(path):
    return sorted(entry.name for entry in path.parent.iterdir())


async def test_a_row_comes_back_whole(database):
    await write(database, replace(ROW, client_task_id="c", recipients=("b@x", "a@x", "b@x")))

    opened = await open_queries(url_of(database))
    [[send]] = [page async for page in opened.sends(SendFilter())]

    assert send.recipients == ("b@x", "a@x", "b@x")
    assert {name: getattr(send, name) for name in COLUMNS["task_done"]} == {
        "id": 1,
        "task_id": str(ROW.task_id),
        "client_task_id": "c",
        "task_type": "mention",
        "sender": "Alice@Example.COM",
        "sender_domain": "example.com",
        "client": "127.0.0.1",
        "sent_at": NOW,
        "expires_at": NOW + timedelta(days=30),
        "upstream": "primary",
        "upstream_reply": "250 2.0.0 Ok: queued as 4F3A",
        "message_id": "<1@example.com>",
        "size": 4096,
        "duration_ms": 12,
        "data": {"tags": ["a"]},
    }


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ({}, [4, 3, 2, 1]),
        ({"sender": "alice@EXAMPLE.com"}, [1]),
        ({"sender": "@Example.Com"}, [3, 1]),
        ({"sender": ""}, [4]),
        ({"recipient": "BOB@example.net"}, [4, 1]),
        ({"recipient": "@example.NET"}, [4, 2, 1]),
        ({"recipient": "bob"}, []),
        ({"task_type": "digest"}, [3, 2]),
        ({"task_type": "Digest"}, []),
        ({"client": "billing"}, [2]),
        ({"message_id": "1@example.com"}, [4, 1]),
        ({"message_id": "<1@example.com>"}, [4, 1]),
        ({"message_id": "<1@example.com>", "recipient": "@example.net", "sender": ""}, [4]),
        ({"task_id": UUID(int=3)}, [3]),
        ({"task_id": UUID(int=3), "recipient": "bob@example.net"}, []),
        ({"since": NOW + timedelta(seconds=3)}, [4, 3]),
        ({"until": NOW + timedelta(seconds=3)}, [2, 1]),
        ({"recipient": "@example.net", "since": NOW + timedelta(seconds=2), "task_type": "digest"}, [2]),
        ({"sender": "' OR 1=1 --"}, []),
        ({"recipient": "*@example.net"}, [4, 2, 1]),
        ({"recipient": "B*@Example.net"}, [4, 1]),
        ({"recipient": "b*"}, [4, 1]),
        ({"recipient": "*@*.net"}, [4, 2, 1]),
        ({"recipient": "*@*.org", "sender": "@example.com"}, [3]),
        ({"recipient": "b*b@example.net", "task_id": UUID(int=1)}, [1]),
        ({"recipient": "_ob@example.net"}, []),
        ({"recipient": "%@example.net"}, []),
        ({"sender": "*@*"}, [3, 2, 1]),
        ({"sender": r"\*@example.com"}, []),
        ({"recipient": "nobody@x", "aliases": ("BOB@example.net", "x@example.org")}, [4, 3, 1]),
        ({"task_type": "DIG*"}, [3, 2]),
        ({"client": "127.*"}, [4, 3, 1]),
        ({"upstream": "primary", "client": "*ling"}, [2]),
        ({"upstream": "prim"}, []),
    ],
    ids=str,
)
async def test_filters_combine(database, wanted, numbers):
    await write(
        database,
        row(1),
        row(
            2,
            sender="carol@elsewhere",
            task_type="digest",
            client="billing",
            recipients=("dan@example.net",),
            message_id="<2@example.com>",
        ),
        row(3, sender="dave@example.com", task_type="digest", recipients=("x@example.org",), message_id=None),
        row(4, sender="", recipients=("eve@example.net", "Bob@Example.net", "bob@example.net")),
    )
    assert await found(database, **wanted) == numbers


@pytest.mark.parametrize(
    "wanted", [{}, {"recipient": "@example.net"}, {"sender": "alice@example.com"}], ids=str
)
@pytest.mark.parametrize("limit", [0, 1, PAGE_ROWS, PAGE_ROWS + 1, None])
async def test_pages_go_on_where_the_last_one_ended(database, wanted, limit):
    total = 2 * PAGE_ROWS + 3
    # All of one moment, to the microsecond: the id decides.
    await write(
        database,
        *(replace(row(n, recipients=("a@example.net", "b@example.net")), sent_at=NOW) for n in range(total)),
    )

    assert await found(database, limit, **wanted) == list(reversed(range(total)))[:limit]


async def test_a_page_is_bounded(database):
    await write(database, *map(row, range(PAGE_ROWS + 1)))

    opened = await open_queries(url_of(database))

    assert [len(page) async for page in opened.sends(SendFilter())] == [PAGE_ROWS, 1]


async def test_rows_that_come_between_two_pages_move_nothing(database):
    await write(database, *map(row, range(PAGE_ROWS + 1)))
    store = await open_store(url_of(database), Retention(timedelta(days=30)))
    opened = await open_queries(url_of(database))
    seen = []

    async for page in opened.sends(SendFilter()):
        seen += [UUID(send.task_id).int for send in page]
        await store.write([row(9000 + len(seen))])
    await store.close()

    assert seen == list(reversed(range(PAGE_ROWS + 1)))


# Plans

VALUES = {
    "sender": ["a@b", "@b", "a*"],
    "recipient": ["a@b", "a*@b", "a*"],
    "task_type": ["t"],
    "client": ["c"],
    "message_id": ["m"],
    "task_id": [UUID(int=5)],
    "since": [NOW],
    "until": [NOW],
}
COMBINATIONS = [
    dict(zip(names, values, strict=True))
    for count in range(len(VALUES) + 1)
    for names in itertools.combinations(VALUES, count)
    for values in itertools.product(*(VALUES[name] for name in names))
]


def plan_of(raw, statement):
    text = str(
        statement.compile(dialect=heed_hints(sqlite.dialect()), compile_kwargs={"literal_binds": True})
    )
    return [step[3] for step in raw.execute(f"EXPLAIN QUERY PLAN {text}")]


def test_no_combination_of_filters_reads_a_whole_table():
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw)
        for wanted in COMBINATIONS:
            for after in (None, (NOW, 5)):
                plan = plan_of(raw, page_of_sends(SendFilter(**wanted), 20, after))
                scans = [step for step in plan if step.startswith("SCAN ") and step != "SCAN page"]
                # Without any condition, or with a pattern alone, rows are read off the end of the index.
                led = after or set(wanted.values()) - {"a*"}
                allowed = [] if led else ["SCAN task_done USING INDEX ix_task_done_sent_at"]
                assert scans == allowed, (wanted, plan)
        assert plan_of(raw, recipients_of([1, 2])) == [
            "SEARCH task_done_recipient USING PRIMARY KEY (task_done_id=?)"
        ]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({"sender": "a@b"}, "ix_task_done_sender (<expr>=?"),
        ({"sender": "@b"}, "ix_task_done_sender_domain (sender_domain=?"),
        ({"recipient": "a@b"}, "ix_task_done_recipient_recipient (<expr>=?"),
        ({"recipient": "@b"}, "ix_task_done_recipient_recipient_domain (recipient_domain=?"),
        ({"task_type": "t"}, "ix_task_done_task_type (task_type=?"),
        ({"client": "c"}, "ix_task_done_client (client=?"),
    ],
    ids=str,
)
def test_each_index_gives_the_window_and_the_order_too(wanted, index):
    """So that the newest twenty of a million cost twenty."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw)
        plan = plan_of(raw, page_of_sends(SendFilter(**wanted, since=NOW), 20))

    assert any(f"INDEX {index} AND sent_at>?)" in step for step in plan), plan
    # By recipient, the rows of the page (and no others) are put in order once more.
    assert ("USE TEMP B-TREE FOR ORDER BY" in plan) == ("recipient" in wanted)


def test_the_statements_are_postgresql_too():
    for wanted in COMBINATIONS:
        text = str(page_of_sends(SendFilter(**wanted), 20, (NOW, 5)).compile(dialect=postgresql.dialect()))
        assert "INDEXED BY" not in text
        assert "TIMESTAMP WITH TIME ZONE" in text


# What is refused


async def refusal(path):
    with pytest.raises(StoreError) as caught:
        await open_queries(f"sqlite:///{path}")
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


async def test_a_missing_file_is_not_made(path):
    assert (await refusal(path)).startswith("no such file")
    assert (await refusal(path.parent / "no" / "t.db")).startswith("no such file")
    assert names_in(path) == []


@pytest.mark.parametrize("content", [b"", b"short", b"no database at all\n" * 100])
async def test_what_is_no_store(path, content):
    path.write_bytes(content)
    assert "is not a" in await refusal(path)
    assert path.read_bytes() == content
    assert names_in(path) == ["t.db"]


async def test_a_directory(path):
    path.mkdir()
    assert (await refusal(path)).startswith("is not a file")


async def test_a_file_for_a_directory(path):
    path.write_bytes(b"")
    assert "Not a directory" in await refusal(path / "t.db")


async def test_a_foreign_database(path):
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE auth_user (id)")
    assert (await refusal(path)).startswith("is not a store of the relay")
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE task_done (id)")
    assert "that the relay did not make" in await refusal(path)


@pytest.mark.parametrize(
    ("version", "advice"),
    [(SCHEMA_VERSIONS[0], "start the relay on it once"), ("9999", "install the newer version")],
)
async def test_another_schema_version(path, version, advice):
    await write(path, ROW)
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute(f"UPDATE {VERSION_TABLE} SET version_num = ?", (version,))

    assert advice in await refusal(path)


async def test_a_column_that_is_gone(path):
    await write(path, ROW)
    with closing(sqlite3.connect(path)) as raw, raw:
        for (view,) in raw.execute("SELECT name FROM sqlite_schema WHERE type = 'view'").fetchall():
            raw.execute(f"DROP VIEW {view}")
        raw.execute("CREATE VIEW task_done_send AS SELECT 1")
        raw.execute("ALTER TABLE task_done DROP COLUMN size")

    assert "task_done has no column size" in await refusal(path)


# Beside a relay, and without one


async def test_a_store_that_nobody_has_open_is_left_as_it_is(path):
    await write(path, ROW)
    before = path.read_bytes()

    assert await found(path) == [1]
    assert names_in(path) == ["t.db"]
    assert path.read_bytes() == before


async def test_a_writer_neither_waits_nor_is_waited_for(path):
    await write(path, row(1))
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE task_done SET task_type = 'later'")
        opened = await open_queries(f"sqlite:///{path}")
        pages = opened.sends(SendFilter())

        [send] = await anext(pages)
        writer.execute("COMMIT")  # with the reader in the middle of its pages
        assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        await pages.aclose()

        assert send.task_type == "mention"
        assert await found(path, task_type="later") == [1]


async def test_by_a_link_the_rows_of_a_relay_that_runs_are_there_too(path):
    """Its write-ahead log stands beside the file, not beside the link."""
    real = path.with_name("real") / "other.db"
    real.parent.mkdir()
    path.symlink_to(real)
    await write(real, row(1))
    store = await open_store(url_of(path), Retention(timedelta(days=30)))
    try:
        await store.write([row(2)])
        assert await found(path) == [2, 1]
    finally:
        await store.close()


async def test_a_relay_that_starts_in_the_middle_is_noticed(path, monkeypatch):
    """The file was taken for one that does not change, and then it did."""
    await write(path, row(1))
    opened = await open_queries(f"sqlite:///{path}")
    stores = []
    fetch = queries.fetch_sends

    def interrupted(connection, page):
        result = fetch(connection, page)
        if not stores:
            stores.append(sqlite3.connect(path, isolation_level=None, check_same_thread=False))
            stores[0].execute("PRAGMA wal_autocheckpoint = 1")
            stores[0].execute("UPDATE task_done SET task_type = 'later'")
        return result

    monkeypatch.setattr(queries, "fetch_sends", interrupted)
    [[send]] = [page async for page in opened.sends(SendFilter())]
    stores[0].close()

    assert send.task_type == "later"


async def test_a_file_that_changes_all_the_time_is_given_up(path, monkeypatch):
    await write(path, row(1))
    opened = await open_queries(f"sqlite:///{path}")
    seconds = itertools.count(1)
    fetch = queries.fetch_sends

    def touched(connection, page):
        result = fetch(connection, page)
        os.utime(path, (0, next(seconds)))
        return result

    monkeypatch.setattr(queries, "fetch_sends", touched)
    with pytest.raises(StoreError, match="changes hands"):
        await anext(opened.sends(SendFilter()))
    assert next(seconds) == reader_module.ATTEMPTS + 1


async def test_a_damaged_page(path):
    await write(path, *map(row, range(300)))
    content = bytearray(path.read_bytes())
    content[8192:-4096] = b"\xff" * (len(content) - 8192 - 4096)
    path.write_bytes(content)

    assert "is damaged" in await refusal(path)


@pytest.fixture
def reader():
    """A directory that is not the reader's, whom file modes hold for (they do not for root)."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory / "t.db"
        os.seteuid(0)


@pytest.mark.parametrize("left", [[], ["-wal", "-shm"]], ids=["stopped", "killed"])
async def test_a_directory_that_cannot_be_written(reader, left):
    await write(reader, row(1))
    with closing(sqlite3.connect(reader, isolation_level=None)) as raw:
        if left:  # as after a kill: what was committed last is in the log alone
            raw.execute("UPDATE task_done SET task_type = 'later'")
        for name in names_in(reader):
            (reader.parent / name).chmod(0o644)
        if not left:
            raw.close()
        before = names_in(reader)
        os.seteuid(65534)
        assert await found(reader, task_type="later" if left else "mention") == [1]
        os.seteuid(0)
        assert names_in(reader) == before == ["t.db", *sorted(f"t.db{end}" for end in left)]


@pytest.mark.parametrize(
    ("mode", "log_mode", "reason"), [(0o600, 0o644, "cannot be read"), (0o644, 0o600, "-wal and -shm files")]
)
async def test_what_this_user_may_not_read(reader, mode, log_mode, reason):
    await write(reader, row(1))
    with closing(sqlite3.connect(reader, isolation_level=None)) as raw:
        raw.execute("UPDATE task_done SET task_type = 'later'")
        for name in names_in(reader):
            (reader.parent / name).chmod(log_mode)
        reader.chmod(mode)
        os.seteuid(65534)
        assert reason in await refusal(reader)
        os.seteuid(0)


# In doubt


def doubt(number, **changes):
    """A message in doubt, `number // 2` seconds after NOW."""
    values = {name: getattr(ROW, name) for name in ("task_type", "sender", "client", "upstream", "size")}
    values |= {name: getattr(ROW, name) for name in ("duration_ms", "recipients", "message_id", "data")}
    values |= {"task_id": UUID(int=number), "since": NOW + timedelta(seconds=number // 2), "reason": "lost"}
    return Doubt(**(values | changes))


async def found_in_doubt(path, limit=None, **wanted):
    """The messages in doubt, by their number, and the sizes of the pages."""
    opened = await open_queries(url_of(path))
    pages = [page async for page in opened.doubts(SendFilter(**wanted), limit=limit)]
    return [UUID(each.task_id).int for page in pages for each in page], [len(page) for page in pages]


async def test_what_is_in_doubt_comes_back_whole(database):
    await write(database, doubt(1, recipients=("b@x", "A@x", "b@x")))
    opened = await open_queries(url_of(database))
    [[entry]] = [page async for page in opened.doubts(SendFilter())]
    assert entry.recipients == ("b@x", "A@x", "b@x")
    assert (entry.since, entry.since.tzinfo, entry.reason, entry.data) == (NOW, UTC, "lost", {"tags": ["a"]})
    assert await opened.count_in_doubt() == 1


async def test_what_is_in_doubt_comes_newest_first_in_pages(database):
    count = 2 * PAGE_ROWS + 7  # two of the same moment each, also across pages
    await write(database, *(doubt(number) for number in range(count)))
    newest_first = list(range(count - 1, -1, -1))
    assert await found_in_doubt(database) == (newest_first, [PAGE_ROWS, PAGE_ROWS, 7])
    assert await found_in_doubt(database, limit=PAGE_ROWS + 1) == (
        newest_first[: PAGE_ROWS + 1],
        [PAGE_ROWS, 1],
    )
    assert (
        await found_in_doubt(database, since=NOW + timedelta(seconds=2), until=NOW + timedelta(seconds=3))
    )[0] == [5, 4]


def test_the_page_of_what_is_in_doubt_needs_no_sorting(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        upgrade(raw)
        for wanted in (SendFilter(), SendFilter(recipient="@x", sender="a@b", since=NOW)):
            page = page_of_doubts(wanted, 10, (NOW, 1))
            statement = page.compile(
                dialect=heed_hints(sqlite.dialect()), compile_kwargs={"literal_binds": True}
            )
            plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert "USING INDEX ix_task_in_doubt_since" in plan[0]
            assert not any("TEMP B-TREE" in step for step in plan)
