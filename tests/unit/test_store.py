from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

import orjson
import pytest

from relay.envelope import domain_of
from relay.records import store as store_module
from relay.records.model import Doubt, Record, Settled
from relay.records.retention import Retention
from relay.records.store import ExpiryBusyError, RejectedRecordError, StoreError, utc_now

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
DAY = timedelta(days=1)
MONTH = Retention(30 * DAY)


def record(number=0, **changes):
    values = {
        "task_id": UUID(int=number),
        "task_type": "mention",
        "sender": "Alice@Example.COM",
        "client": "127.0.0.1",
        "sent_at": NOW,
        "upstream": "primary",
        "upstream_reply": "250 2.0.0 Ok: queued as 4F3A",
        "size": 4096,
        "duration_ms": 12,
        "recipients": ("bob@example.net",),
    }
    return Record(**(values | changes))


def doubt(number=0, **changes):
    values = {
        "task_id": UUID(int=number),
        "task_type": "mention",
        "sender": "Alice@Example.COM",
        "client": "127.0.0.1",
        "since": NOW,
        "upstream": "primary",
        "reason": "closed by the upstream",
        "size": 4096,
        "duration_ms": 12,
        "recipients": ("bob@example.net",),
    }
    return Doubt(**(values | changes))


only_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
async def open_store(database):
    """Opens stores on one file and closes them after the test."""
    opened = []

    async def opening(retention=MONTH, **options):
        chosen = {"clock": lambda: NOW} | options
        store = await store_module.open_store(database.url, retention, **chosen)
        opened.append(store)
        return store

    yield opening
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store):
    return await open_store()


def rows(database, query, *parameters):
    return database.rows(query, *parameters)


# Writing


async def test_a_row_says_what_the_record_says(store, database):
    data = {"headers": {"Message-ID": '<"ü\\n🦉>'}, "n": [1, 1.5, None, True], "empty": {}}
    await store.write(
        [
            record(
                0x0192_F5B4_7C3A_7ABC_8DEF_0123_4567_89AB,
                client_task_id="job-1",
                message_id="<m@example.com>",
                recipients=("Bob@Example.NET", '"a@b"@Ex.org', "postmaster"),
                data=data,
            )
        ]
    )
    row = database.row("SELECT * FROM task_done")
    assert orjson.loads(row.pop("data")) == data
    assert row == {
        "id": 1,
        "task_id": "0192f5b4-7c3a-7abc-8def-0123456789ab",
        "client_task_id": "job-1",
        "task_type": "mention",
        "sender": "Alice@Example.COM",
        "sender_domain": "example.com",
        "client": "127.0.0.1",
        "sent_at": "2026-11-23 07:46:00.123456",
        "expires_at": "2026-12-23 07:46:00.123456",
        "upstream": "primary",
        "upstream_reply": "250 2.0.0 Ok: queued as 4F3A",
        "message_id": "<m@example.com>",
        "size": 4096,
        "duration_ms": 12,
    }
    assert rows(database, "SELECT * FROM task_done_recipient ORDER BY ordinal") == [
        (1, 0, "Bob@Example.NET", "example.net", "2026-11-23 07:46:00.123456"),
        (1, 1, '"a@b"@Ex.org', "ex.org", "2026-11-23 07:46:00.123456"),
        (1, 2, "postmaster", "", "2026-11-23 07:46:00.123456"),
    ]
    flat = "SELECT task_id, sender, recipient FROM task_done_send ORDER BY ordinal"
    assert [row[1:] for row in rows(database, flat)] == [
        ("Alice@Example.COM", "Bob@Example.NET"),
        ("Alice@Example.COM", '"a@b"@Ex.org'),
        ("Alice@Example.COM", "postmaster"),
    ]


@only_sqlite
async def test_every_column_has_the_type_that_readers_expect(store, database):
    await store.write([record(message_id="5", client_task_id="007", sender="", upstream_reply="1e5")])
    texts = (
        "client_task_id",
        "message_id",
        "sender",
        "sender_domain",
        "upstream_reply",
        "data",
        "expires_at",
    )
    kinds = ", ".join(f"typeof({column})" for column in (*texts, "size", "duration_ms"))
    assert rows(database, f"SELECT {kinds} FROM task_done") == [("text",) * 7 + ("integer",) * 2]
    assert rows(database, "SELECT client_task_id, message_id, sender, data FROM task_done") == [
        ("007", "5", "", "{}")
    ]
    assert rows(database, "SELECT datetime(sent_at), date(expires_at) FROM task_done") == [
        ("2026-11-23 07:46:00", "2026-12-23")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "ü",
        "🦉",
        "\x01\x1f\x7f",
        '"\\',
        "\\u0041",
        "a\tb\r\nc",
        "\u2028\ufeff\uffff",
        "x" * 100_000,
        "'; DROP TABLE",
    ],
)
async def test_text_comes_back_as_it_went(store, database, text):
    await store.write([record(sender=text, upstream_reply=text, data={text: text}, recipients=(text,))])
    assert rows(database, "SELECT sender, upstream_reply, recipient FROM task_done_send") == [
        (text, text, text)
    ]
    assert orjson.loads(rows(database, "SELECT data FROM task_done")[0][0]) == {text: text}


async def test_a_time_in_another_zone_is_stored_as_utc(store, database):
    await store.write([record(sent_at=NOW.astimezone(timezone(timedelta(hours=9))))])
    assert rows(database, "SELECT sent_at, expires_at FROM task_done") == [
        ("2026-11-23 07:46:00.123456", "2026-12-23 07:46:00.123456")
    ]


async def test_never_is_null(open_store, database):
    store = await open_store(Retention(None, {"digest": DAY}))
    await store.write([record(1), record(2, task_type="digest")])
    assert rows(database, "SELECT expires_at FROM task_done ORDER BY task_id") == [
        (None,),
        ("2026-11-24 07:46:00.123456",),
    ]


async def test_to_write_again_changes_nothing(store, database):
    batch = [record(number, recipients=("a@x", "b@x")) for number in range(5)]
    await store.write(batch)
    before = rows(database, "SELECT * FROM task_done_send")
    await store.write(batch)
    await store.write([record(4, sender="other@x", recipients=("c@x",))])
    assert rows(database, "SELECT * FROM task_done_send") == before


async def test_a_batch_that_is_there_in_part_is_completed(store, database):
    batch = [record(number, recipients=("a@x", "b@x")) for number in range(5)]
    await store.write(batch[1:4:2])
    await store.write([*batch, batch[4]])
    assert await store.count() == 5
    counts = "SELECT task_id, count(*) FROM task_done_send GROUP BY task_id ORDER BY task_id"
    assert [count for _, count in rows(database, counts)] == [2, 2, 2, 2, 2]


async def test_an_empty_batch_is_nothing(store):
    await store.write([])
    assert await store.count() == 0


async def test_a_thousand_recipients(store, database):
    recipients = tuple(f"user{number}@example.net" for number in range(1000))
    await store.write([record(recipients=recipients)])
    found = rows(database, "SELECT recipient FROM task_done_send ORDER BY ordinal")
    assert tuple(row[0] for row in found) == recipients


@pytest.mark.parametrize(
    "recipients",
    [
        ("twice@x", "other@Y", "twice@x", "twice@x"),
        ("", "0", "$", "[1]", '{"a":1}', "null", '"'),
        ('"a\\b"@x', "\x01@\x7f", "ü@Ü", "🦉@🦉", "a\tb@x", "twice@x", "TWICE@X", "\u2028@x"),
    ],
)
async def test_recipients_keep_their_order_and_their_text(store, database, recipients):
    await store.write([record(1, recipients=recipients), record(2, recipients=recipients[::-1])])
    found = "SELECT recipient, recipient_domain FROM task_done_send WHERE task_id = '{}' ORDER BY ordinal"
    given = [(each, domain_of(each)) for each in recipients]
    assert rows(database, found.format(UUID(int=1))) == given
    assert rows(database, found.format(UUID(int=2))) == given[::-1]


async def test_batches_of_any_size(store, database):
    sizes = [*range(1, 14), 25, 47, 48, 49, 500, 1023, 1024, 1025, 2500]
    number = 0
    for size in sizes:
        await store.write([record(number + at) for at in range(size)])
        number += size
    assert await store.count() == number == sum(sizes)
    assert rows(database, "SELECT count(*) FROM task_done_recipient") == [(number,)]


@pytest.mark.parametrize("size", [1, 3, 9, 48, 49])
@pytest.mark.parametrize("beside", [[], [record(1000, recipients=("c@x.test", "d@y.test"))]])
async def test_each_send_of_a_batch_keeps_its_own(store, database, size, beside):
    """Alone among sends to one recipient, and beside another, which goes another way into SQLite."""
    names = ("task_type", "sender", "client", "upstream", "upstream_reply", "client_task_id", "message_id")
    figures = ("size", "duration_ms")
    sends = []
    for number in range(size):
        texts = {name: f"{name}-{number}@{name}.{number}.test" for name in names}
        if number % 2:
            texts |= {"client_task_id": None, "message_id": None}
        numbers = {name: 10 * number + at for at, name in enumerate(figures)}
        at = {"sent_at": NOW + timedelta(seconds=number), "recipients": (f"b{number}@to{number}.test",)}
        sends.append(record(number, **texts, **numbers, **at, data={"number": number}))
    await store.write([*sends, *beside])
    columns = ", ".join((*names, *figures, "sender_domain", "recipient", "recipient_domain"))
    found = rows(
        database, f"SELECT {columns} FROM task_done_send WHERE ordinal = 0 ORDER BY sent_at, task_id"
    )
    expected = [
        (
            *(getattr(send, name) for name in (*names, *figures)),
            domain_of(send.sender),
            send.recipients[0],
            domain_of(send.recipients[0]),
        )
        for send in sends
    ]
    assert [row for row in found if row[0] != "mention"] == expected
    together = (
        "SELECT count(*) FROM task_done JOIN task_done_recipient USING (sent_at) WHERE id = task_done_id"
    )
    assert rows(database, together) == [(size + 2 * len(beside),)]


async def test_a_batch_larger_than_the_recorders_is_kept_whole_or_not_at_all(store):
    batch = [record(number) for number in range(2500)]
    with pytest.raises(RejectedRecordError):
        await store.write([*batch, record(2500, upstream=None)])
    assert await store.count() == 0
    await store.write(batch)
    assert await store.count() == len(batch)


@pytest.mark.parametrize(
    "bad",
    [
        {"sender": "\udc80@example.com"},
        {"recipients": ("ok@x", "\udcff@x")},
        {"data": {"n": 2**70}},
        {"data": {"x": "\ud800"}},
        {"data": {"x": object()}},
        {"size": 2**64},
        {"upstream": None},
        {"recipients": (None,)},
        {"sent_at": datetime(2026, 11, 23)},  # noqa: DTZ001
    ],
    ids=lambda bad: next(iter(bad)),
)
async def test_data_that_will_never_fit_refuses_the_whole_batch_and_no_other(store, database, bad):
    with pytest.raises(RejectedRecordError) as caught:
        await store.write([record(1), record(2, **bad), record(3)])
    assert "\n" not in str(caught.value)
    assert rows(database, "SELECT * FROM task_done_recipient") == []
    await store.write([record(1), record(3)])
    assert await store.count() == 2


async def test_writes_at_the_same_time_all_arrive(store):
    await asyncio.gather(
        *(store.write([record(number * 10 + row) for row in range(10)]) for number in range(30))
    )
    assert await store.count() == 300


async def test_a_cancelled_write_is_finished_and_leaves_no_transaction_open(store, database):
    writes = [asyncio.ensure_future(store.write([record(number)])) for number in range(20)]
    await asyncio.sleep(0)
    for write in writes:
        write.cancel()
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert any(isinstance(result, asyncio.CancelledError) for result in results)
    await store.write([record(100)])
    if database.kind == "sqlite":
        assert await store.count() == 21
    else:  # a write that had not begun, or that the server could still be told to leave, has not happened
        assert 1 <= await store.count() <= 21
        assert rows(database, "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == [(0,)]


async def test_after_close_the_store_says_so(store):
    await store.write([record()])
    await store.close()
    await store.close()
    for use in (store.write([record()]), store.count(), store.expire(NOW, 10), store.follow_retention()):
        with pytest.raises(StoreError, match="closed") as caught:
            await use
        assert not isinstance(caught.value, RejectedRecordError)


async def test_close_finishes_what_was_asked_for(store, database):
    write = asyncio.ensure_future(store.write([record()]))
    await asyncio.sleep(0)
    await store.close()
    await write
    assert rows(database, "SELECT count(*) FROM task_done") == [(1,)]


async def test_two_stores_on_one_file_do_not_mix_their_recipients(open_store, database):
    stores = [await open_store(busy_timeout=30) for _ in range(2)]
    await asyncio.gather(
        *(
            stores[number % 2].write([record(number, sender=f"{number}@x", recipients=(f"{number}@x",))])
            for number in range(60)
        )
    )
    assert rows(database, "SELECT count(*) FROM task_done_send WHERE sender = recipient") == [(60,)]


@only_sqlite
@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
async def test_a_lock_of_another_process_is_an_error_after_the_timeout_and_then_over(
    open_store, database, begin
):
    store = await open_store(busy_timeout=0.1)
    script = (
        "import sqlite3, sys; raw = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "raw.execute(sys.argv[2]); print('held', flush=True); sys.stdin.readline(); raw.execute('ROLLBACK')"
    )
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", script, str(database), begin),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert await holder.stdout.readline() == b"held\n"
    with pytest.raises(StoreError, match=r"t\.db: locked by another process") as caught:
        await store.write([record()])
    assert not isinstance(caught.value, RejectedRecordError)
    await holder.communicate(b"\n")
    await store.write([record()])
    assert await store.count() == 1


@only_sqlite
async def test_a_full_disk_is_an_error_and_when_there_is_room_again_it_is_over(store, database):
    def limit(pages):
        return store._database.run(lambda raw: raw.execute(f"PRAGMA max_page_count = {pages}").fetchall())

    await store.write([record()])
    await limit(1)  # no less than it has
    with pytest.raises(StoreError, match=r"t\.db: the disk is full") as caught:
        await store.write([record(number) for number in range(1, 1000)])
    assert not isinstance(caught.value, RejectedRecordError)
    assert await store.count() == 1
    await limit(1_000_000)
    await store.write([record(number) for number in range(1, 1000)])
    assert await store.count() == 1000


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


async def test_a_disk_that_is_really_full(small_disk):
    store = await store_module.open_store(f"sqlite:///{small_disk}/t.db", MONTH)
    await store.write([record()])
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "filler")
    with pytest.raises(StoreError, match=r"disk is full|reading or writing failed") as caught:
        await store.write([record(number, data={"x": "x" * 1000}) for number in range(1, 1000)])
    assert not isinstance(caught.value, RejectedRecordError)
    assert await store.count() == 1
    (small_disk / "filler").unlink()
    await store.write([record(2)])
    assert await store.count() == 2
    await store.close()


WRITER = textwrap.dedent("""
    import asyncio, sys
    from datetime import UTC, datetime, timedelta
    from uuid import uuid4
    from relay.records.model import Record
    from relay.records.retention import Retention
    from relay.records.store import open_store

    def record(batch):
        return Record(
            task_id=uuid4(), task_type="t", sender="a@x", client=batch, sent_at=datetime.now(UTC),
            upstream="u", upstream_reply="250", size=1, duration_ms=1, recipients=("b@x", "c@x"),
        )

    async def main():
        store = await open_store(sys.argv[1], Retention(timedelta(days=1)))
        while True:
            batch = str(uuid4())
            await store.write([record(batch) for _ in range(200)])
            print(batch, flush=True)

    asyncio.run(main())
""")


@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_a_killed_process_leaves_whole_batches_and_every_one_that_it_was_told_of(database, after):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, database.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with writer:
        told = [writer.stdout.readline().strip() for _ in range(after)]
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.read().split()
    found = dict(rows(database, "SELECT client, count(*) FROM task_done_send GROUP BY client"))
    assert set(found.values()) == {400}
    assert set(told) <= set(found)
    if database.kind == "sqlite":
        assert rows(database, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize(
    ("address", "domain"),
    [("a@B.c", "b.c"), ("", ""), ("postmaster", ""), ('"x@y"@Z', "z"), ("@r:a@[1.2.3.4]", "[1.2.3.4]")],
)
def test_the_domain_is_what_follows_the_last_at(address, domain):
    assert domain_of(address) == domain


# In doubt


def in_doubt(database):
    return [UUID(row[0]).int for row in rows(database, "SELECT task_id FROM task_in_doubt ORDER BY task_id")]


def done(database):
    return [UUID(row[0]).int for row in rows(database, "SELECT task_id FROM task_done ORDER BY task_id")]


async def test_a_row_says_what_the_doubt_says(store, database):
    data = {"client_reply": "451 4.4.2 The upstream server did not answer", "tags": ["ü"]}
    await store.write(
        [
            doubt(
                0x0192_F5B4_7C3A_7ABC_8DEF_0123_4567_89AB,
                client_task_id="job-1",
                message_id="<m@example.com>",
                recipients=("Bob@Example.NET", '"a@b"@Ex.org'),
                data=data,
            )
        ]
    )
    row = database.row("SELECT * FROM task_in_doubt")
    assert orjson.loads(row.pop("data")) == data
    assert orjson.loads(row.pop("recipients")) == ["Bob@Example.NET", '"a@b"@Ex.org']
    assert row == {
        "id": 1,
        "task_id": "0192f5b4-7c3a-7abc-8def-0123456789ab",
        "client_task_id": "job-1",
        "task_type": "mention",
        "sender": "Alice@Example.COM",
        "sender_domain": "example.com",
        "client": "127.0.0.1",
        "since": "2026-11-23 07:46:00.123456",
        "expires_at": "2026-12-23 07:46:00.123456",
        "upstream": "primary",
        "reason": "closed by the upstream",
        "message_id": "<m@example.com>",
        "size": 4096,
        "duration_ms": 12,
    }


async def test_a_doubt_is_written_once(store, database):
    await store.write([doubt(1)])
    await store.write([doubt(1, reason="again"), doubt(2)])
    assert rows(database, "SELECT reason FROM task_in_doubt ORDER BY task_id") == [
        ("closed by the upstream",),
        ("closed by the upstream",),
    ]


async def test_a_late_acceptance_ends_its_doubt_and_no_other(store, database):
    await store.write([doubt(1), doubt(2)])
    await store.write([record(1, doubted=True), record(3)])
    assert (done(database), in_doubt(database)) == ([1, 3], [2])


async def test_a_late_refusal_ends_its_doubt_and_no_other(store, database):
    await store.write([doubt(1), doubt(2)])
    await store.write([Settled(UUID(int=1)), Settled(UUID(int=9))])
    assert (done(database), in_doubt(database)) == ([], [2])


async def test_a_message_that_has_its_row_is_not_in_doubt(store, database):
    await store.write([record(1)])
    await store.write([doubt(1), doubt(2)])
    assert (done(database), in_doubt(database)) == ([1], [2])


@pytest.mark.parametrize("end", [record(1), record(1, doubted=True), Settled(UUID(int=1))])
async def test_within_one_batch_the_end_of_a_doubt_counts(store, database, end):
    for batch in ([doubt(1), end], [end, doubt(1)], [record(2), doubt(1), doubt(3), end]):
        await store.write(batch)
        assert in_doubt(database) in ([], [3])
    assert (1 in done(database)) == isinstance(end, Record)


async def test_a_record_that_nobody_doubted_does_not_look_at_the_doubts(store, database):
    # What the usual row is spared. That it could not stay so is the caller's part: `doubted` is set.
    await store.write([doubt(1)])
    await store.write([record(1)])
    assert in_doubt(database) == [1]


async def test_a_doubt_that_will_never_fit_refuses_the_whole_batch(store, database):
    for bad in (doubt(1, sender="\ud800"), doubt(1, size=2**64), doubt(1, since=NOW.replace(tzinfo=None))):
        with pytest.raises(RejectedRecordError):
            await store.write([record(2), bad])
    assert (done(database), in_doubt(database)) == ([], [])


async def test_doubts_expire_by_their_type_and_with_the_rows(open_store, database):
    store = await open_store(Retention(DAY, {"mention": None}))
    old = NOW - 2 * DAY
    await store.write([doubt(1, task_type="digest", since=old), doubt(2, since=old), record(3)])
    await store.write([doubt(n, task_type="digest", since=old) for n in range(100, 250)])
    await store.write([doubt(4, task_type="digest"), record(5, task_type="digest", sent_at=old)])
    assert await store.expire(NOW, 60, dry_run=True) == 152
    told = []
    assert await store.expire(NOW, 60, on_batch=told.append) == 152
    assert sum(told) == 152
    assert max(told) <= 60  # how far a step comes before it rests depends on the machine
    assert (done(database), in_doubt(database)) == ([3], [2, 4])
    assert await store.expire(NOW + DAY, 60) == 1
    assert in_doubt(database) == [2]


async def test_doubts_follow_changed_settings(open_store, database):
    store = await open_store(Retention(30 * DAY))
    await store.follow_retention()
    count = 1200
    await store.write([doubt(n, since=NOW - 5 * DAY) for n in range(1, count + 1)])
    await store.write([record(5000, sent_at=NOW - 5 * DAY), doubt(5001, task_type="digest")])
    due = []
    shorter = await open_store(Retention(30 * DAY, {"mention": DAY}))
    assert await shorter.follow_retention(on_due=due.append) == count + 1
    assert due == [count + 1]
    assert await shorter.follow_retention() == 0
    assert rows(database, "SELECT DISTINCT expires_at FROM task_in_doubt WHERE task_type = 'mention'") == [
        ("2026-11-19 07:46:00.123456",)
    ]
    assert await shorter.expire(NOW, 500) == count + 1
    assert in_doubt(database) == [5001]


# Retention


def ends(database):
    return dict(rows(database, "SELECT client, expires_at FROM task_done"))


async def test_rows_follow_changed_settings(open_store, database):
    store = await open_store(Retention(30 * DAY, {"digest": DAY}))
    await store.follow_retention()
    await store.write(
        [
            record(1, client="m"),
            record(2, client="d", task_type="digest"),
            record(3, client="r", task_type="r"),
        ]
    )
    store = await open_store(Retention(60 * DAY, {"mention": None, "r": 30 * DAY}))
    assert await store.follow_retention() == 2
    assert ends(database) == {
        "m": None,
        "d": "2027-01-22 07:46:00.123456",
        "r": "2026-12-23 07:46:00.123456",
    }
    store = await open_store(Retention(timedelta(microseconds=1)))
    assert await store.follow_retention() == 3
    assert set(ends(database).values()) == {"2026-11-23 07:46:00.123457"}


async def test_unchanged_settings_touch_nothing(open_store, database):
    store = await open_store()
    await store.follow_retention()
    await store.write([record()])
    database.execute("UPDATE task_done SET expires_at = '2030-01-01 00:00:00.000000'")
    assert await (await open_store(Retention(timedelta(hours=720)))).follow_retention() == 0
    assert rows(database, "SELECT expires_at FROM task_done") == [("2030-01-01 00:00:00.000000",)]


async def test_a_shortening_says_first_how_many_rows_become_due(open_store, database):
    store = await open_store(Retention(None, {"digest": 10 * DAY}))
    await store.follow_retention()
    ages = {"mention": [0, 2, 3, 4], "digest": [0, 4, 6, 11], "receipt": [5, 100]}
    await store.write(
        [
            record(number * 100 + age, task_type=task_type, sent_at=NOW - age * DAY)
            for number, (task_type, some) in enumerate(ages.items())
            for age in some
        ]
    )
    # Due: mentions of 3 and 4 days, the digest of 6 days (that of 11 was due before), no receipt.
    store = await open_store(Retention(3 * DAY, {"digest": 5 * DAY, "receipt": None}))
    told = []

    def note(due):
        told.append(
            (due, rows(database, f"SELECT count(*) FROM task_done WHERE expires_at <= '{str(NOW)[:26]}'"))
        )

    await store.follow_retention(on_due=note)
    assert told == [(3, [(1,)])]
    assert await store.expire(NOW, 100, dry_run=True) == 4


@pytest.mark.parametrize("period", [timedelta.max, 60 * DAY, None])
async def test_a_lengthening_has_nothing_to_say(open_store, period):
    store = await open_store()
    await store.follow_retention()
    await store.write([record(sent_at=NOW - 29 * DAY)])
    told = []
    assert await (await open_store(Retention(period))).follow_retention(on_due=told.append) == 1
    assert told == []


FOLLOWED = "SELECT count(*) FROM task_done WHERE expires_at < '2026-12-01'"


async def test_many_rows_follow_in_steps_that_let_writes_through(open_store, database):
    store = await open_store()
    await store.follow_retention()
    await store.write([record(number) for number in range(2500)])
    store = await open_store(Retention(DAY))
    seen = []

    async def write_meanwhile():
        for number in range(10_000, 10_003):
            await store.write([record(number, client="new")])
            seen.append(rows(database, FOLLOWED)[0][0])

    changed, _ = await asyncio.gather(store.follow_retention(), write_meanwhile())
    assert changed == 2500
    assert rows(database, FOLLOWED) == [(2503,)]
    assert seen[0] < 2500


async def test_a_run_that_was_cut_short_is_taken_up_where_it_was(open_store, database):
    store = await open_store()
    await store.follow_retention()
    await store.write([record(number) for number in range(2500)])
    store = await open_store(Retention(DAY))
    following = asyncio.create_task(store.follow_retention())
    while not rows(database, "SELECT 1 FROM task_done WHERE expires_at < '2026-12-01'"):
        await asyncio.sleep(0)
    following.cancel()
    await asyncio.wait([following])
    done = rows(database, FOLLOWED)[0][0]
    assert following.cancelled()
    with pytest.raises(ExpiryBusyError, match="retention"):
        await store.expire(NOW + 40 * DAY, 100)
    rest = await (await open_store(Retention(DAY))).follow_retention()
    assert 0 < rest <= 2500 - done
    assert rows(database, FOLLOWED) == [(2500,)]
    assert await store.expire(NOW + 2 * DAY, 100) == 2500


async def test_of_two_with_different_settings_the_later_takes_over(open_store, database):
    store = await open_store()
    await store.follow_retention()
    await store.write([record(number) for number in range(2500)])
    earlier, later = [await open_store(Retention(days * DAY)) for days in (1, 2)]
    following = asyncio.create_task(earlier.follow_retention())
    while not rows(database, "SELECT 1 FROM task_done WHERE expires_at < '2026-12-01'"):
        await asyncio.sleep(0)
    await later.follow_retention()
    await following
    assert rows(database, "SELECT DISTINCT expires_at FROM task_done") == [("2026-11-25 07:46:00.123456",)]


def test_the_clock_is_utc():
    assert abs(utc_now() - datetime.now(UTC)) < timedelta(minutes=1)
