"""Expiry, of the store and of the loop: what goes, what stays, who is let through, what is given back."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from relay.records import expiry as expiry_module
from relay.records import pacing
from relay.records.expiry import ExpiryLoop
from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.sqlite import expire as expire_module
from relay.records.store import ExpiryBusyError, StoreError, open_store

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
DAILY = Retention(DAY)


def record(number, expires_at, **changes):
    values = {
        "task_id": UUID(int=number),
        "task_type": "mention",
        "sender": "alice@example.com",
        "client": "127.0.0.1",
        "sent_at": expires_at - DAY,
        "upstream": "primary",
        "upstream_reply": "250 Ok",
        "size": 4096,
        "duration_ms": 12,
        "recipients": ("bob@example.net", "carol@example.net"),
    }
    return Record(**(values | changes))


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


only_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
async def store(database, clock):
    store = await open_store(database.url, DAILY, clock=clock)
    yield store
    await store.close()


def rows(database, query):
    return database.rows(query)


def left(database):
    return [UUID(row[0]).int for row in rows(database, "SELECT task_id FROM task_done ORDER BY task_id")]


def lease(database):
    return rows(database, "SELECT value FROM task_done_state WHERE name = 'expiry'")


async def test_what_has_expired_goes_and_what_has_not_stays(store, database):
    tick = timedelta(microseconds=1)
    ends = [NOW - 2 * SECOND, NOW - SECOND, NOW, NOW + tick, NOW + SECOND]
    await store.write([record(number, end) for number, end in enumerate(ends)])
    assert await store.expire(NOW, 5000, dry_run=True) == 3
    assert left(database) == [0, 1, 2, 3, 4]
    assert await store.expire(NOW, 5000) == 3
    assert left(database) == [3, 4]
    recipients = rows(database, "SELECT task_id, count(*) FROM task_done_send GROUP BY task_id")
    assert [count for _, count in recipients] == [2, 2]
    assert rows(database, "SELECT count(*) FROM task_done_recipient") == [(4,)]
    assert await store.expire(NOW, 5000) == 0
    assert lease(database) == []


async def test_rows_that_never_expire_stay(database, clock):
    store = await open_store(database.url, Retention(None), clock=clock)
    await store.write([record(1, NOW)])
    assert await store.expire(NOW + 36500 * DAY, 5000) == 0
    assert left(database) == [1]
    await store.close()


@pytest.mark.parametrize("batch_size", [1, 7, 50, 120, 1000])
async def test_no_batch_is_larger_than_asked_for(store, batch_size):
    await store.write([record(number, NOW) for number in range(123)])
    batches = []
    assert await store.expire(NOW, batch_size, on_batch=batches.append) == 123
    assert sum(batches) == 123
    assert max(batches) <= batch_size


async def test_a_step_has_only_so_much_work(store, monkeypatch):
    """Recipients are work, too; and when steps turn out long, they stay as small as they begin."""
    monkeypatch.setattr(pacing, "LONGEST_STEP_S", 0.0)
    await store.write([record(number, NOW) for number in range(100)])
    crowd = tuple(f"r{number}@example.net" for number in range(1000))
    await store.write([record(number, NOW + SECOND, recipients=crowd) for number in range(100, 104)])
    batches = []
    await store.expire(NOW + SECOND, 5000, on_batch=batches.append)
    assert batches == [pacing.LEAST // 3] * 20 + [1] * 4


async def test_steps_grow_until_they_are_as_long_as_they_may_be(store, monkeypatch):
    monkeypatch.setattr(pacing, "LONGEST_STEP_S", 3600.0)
    monkeypatch.setattr(pacing, "STEP_S", 3600.0)
    await store.write([record(number, NOW) for number in range(2000)])
    batches = []
    await store.expire(NOW, 5000, on_batch=batches.append)
    assert batches[0] == pacing.LEAST // 3
    assert max(batches) == pacing.MOST // 3
    assert sum(batches) == 2000


async def test_a_run_ends_under_constant_writing(store, database):
    await store.write([record(number, NOW) for number in range(3000)])
    number = 5000
    running = asyncio.create_task(store.expire(NOW, 5000))
    while not running.done():
        await store.write([record(number, NOW + DAY)])
        number += 1
    assert await running == 3000
    assert left(database) == list(range(5000, number))


async def test_a_row_that_is_to_live_longer_meanwhile_stays(store, database):
    """Another process may have changed the retention between the look and the deletion."""
    await store.write([record(number, NOW) for number in range(20)])

    def prolong(rows):
        database.execute("UPDATE task_done SET expires_at = '2027-01-01 00:00:00.000000'")

    assert await store.expire(NOW, 10, on_batch=prolong) < 20
    assert len(left(database)) > 0
    assert await store.expire(NOW, 10) == 0


async def test_how_far_behind(store, clock):
    assert await store.expiry_lag(NOW) == 0.0
    await store.write([record(1, NOW + SECOND), record(2, NOW), record(3, NOW + DAY)])
    assert await store.expiry_lag(NOW - SECOND) == 0.0
    assert await store.expiry_lag(NOW) == 0.0
    assert await store.expiry_lag(NOW + 90 * SECOND) == 90.0
    await store.expire(NOW, 10)
    assert await store.expiry_lag(NOW + 90 * SECOND) == 89.0


@only_sqlite
async def test_a_look_for_the_oldest_needs_no_walk_through_the_table(store):
    plan = await store._database.run(
        lambda raw: raw.execute(
            f"EXPLAIN QUERY PLAN {expire_module._OLDEST_EXPIRED}", {"now": "2026"}
        ).fetchall()
    )
    assert all("ix_task_done_expires_at (expires_at<?)" in row[3] for row in plan)


@only_sqlite
async def test_space_that_a_run_cut_short_left_is_given_back_by_the_next(store, database):
    await store.write([record(number, NOW, data={"x": "x" * 1000}) for number in range(500)])
    await store._database.transaction(lambda raw: raw.execute("DELETE FROM task_done"))
    assert rows(database, "PRAGMA freelist_count") != [(0,)]
    assert await store.expire(NOW, 5000) == 0
    assert rows(database, "PRAGMA freelist_count") == [(0,)]


async def test_writes_come_in_between_the_batches(store, database):
    await store.write([record(number, NOW) for number in range(1000)])
    seen = []

    async def write_meanwhile():
        for number in range(5000, 5005):
            await store.write([record(number, NOW + DAY)])
            seen.append(
                rows(
                    database,
                    "SELECT count(*) FROM task_done WHERE task_id < '00000000-0000-0000-0000-000000001388'",
                )
            )

    deleted, _ = await asyncio.gather(store.expire(NOW, 20), write_meanwhile())
    assert deleted == 1000
    assert left(database) == list(range(5000, 5005))
    assert all(count > 0 for ((count,),) in seen)


@only_sqlite
async def test_space_is_given_back(store, database):
    for start in range(0, 4000, 500):
        await store.write(
            [record(number, NOW, data={"x": "x" * 1000}) for number in range(start, start + 500)]
        )
    await store.write([record(4000, NOW + DAY)])
    await store._database.run(lambda raw: raw.execute("PRAGMA wal_checkpoint").fetchall())
    before = database.path.stat().st_size
    await store.expire(NOW, 5000)
    assert rows(database, "PRAGMA freelist_count") == [(0,)]
    assert database.path.stat().st_size < before / 10
    assert left(database) == [4000]
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]


@only_sqlite
async def test_space_that_cannot_be_given_back_ends_no_run(database, clock):
    """A file restored by other means may have lost its setting; free pages are then used again."""
    store = await open_store(database.url, DAILY, clock=clock)
    await store.close()
    with closing(sqlite3.connect(database.path, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = DELETE")
        raw.execute("PRAGMA auto_vacuum = NONE")
        raw.execute("VACUUM")
    store = await open_store(database.url, DAILY, clock=clock)
    await store.write([record(number, NOW, data={"x": "x" * 1000}) for number in range(500)])
    assert await store.expire(NOW, 5000) == 500
    assert rows(database, "PRAGMA freelist_count") != [(0,)]
    await store.close()


async def test_it_never_runs_twice_at_once(store, database, clock):
    other = await open_store(database.url, DAILY, clock=clock)
    await store.write([record(number, NOW) for number in range(100)])
    running = asyncio.create_task(store.expire(NOW, 1))
    while not lease(database):
        await asyncio.sleep(0)
    for either in (store, other):
        with pytest.raises(ExpiryBusyError, match="another process"):
            await either.expire(NOW, 5000)
    assert await running == 100
    assert await other.expire(NOW, 5000) == 0
    await other.close()


async def test_the_lease_of_a_run_that_died_ends_and_one_that_was_asleep_stops(store, database, clock):
    other = await open_store(database.url, DAILY, clock=clock)
    await store.write([record(number, NOW) for number in range(100)])
    batches = []

    def sleep_for_a_minute(rows):
        """As if the process had been stopped after its first batch: by then another has the lease."""
        batches.append(rows)
        database.execute("UPDATE task_done_state SET value = 'another' WHERE name = 'expiry'")

    first = await store.expire(NOW, 10, on_batch=sleep_for_a_minute)
    assert batches == [first]
    assert lease(database) == [("another",)]
    clock.now = NOW + 59 * SECOND
    with pytest.raises(ExpiryBusyError):
        await other.expire(NOW, 5000)
    clock.now = NOW + 60 * SECOND
    assert await other.expire(NOW, 5000) == 100 - first
    assert lease(database) == []
    await other.close()


@pytest.mark.parametrize(("end", "busy"), [(timedelta(seconds=120), True), (timedelta(seconds=121), False)])
async def test_the_lease_of_a_clock_that_was_ahead_keeps_nobody_away(store, database, end, busy):
    """Of a process that was killed while the machine had the wrong year; clocks of a fleet differ by less."""
    await store.write([record(1, NOW)])
    until = f"{NOW + end:%Y-%m-%d %H:%M:%S.%f}"
    database.execute(f"INSERT INTO task_done_state VALUES ('expiry', 'dead', '{until}')")
    if busy:
        with pytest.raises(ExpiryBusyError):
            await store.expire(NOW, 5000)
    else:
        assert await store.expire(NOW, 5000) == 1
        assert lease(database) == []


async def test_what_is_to_follow_other_settings_is_not_deleted_before_it_does(store, database):
    await store.write([record(1, NOW)])
    state = '{"policy": "another", "done_to": 0, "doubts_to": null}'
    database.execute(f"INSERT INTO task_done_state (name, value) VALUES ('retention', '{state}')")
    with pytest.raises(ExpiryBusyError, match="are being applied"):
        await store.expire(NOW, 5000)
    assert left(database) == [1]
    await store.follow_retention()
    assert await store.expire(NOW, 5000) == 1


async def test_a_cancelled_run_gives_its_lease_back(store, database):
    await store.write([record(number, NOW) for number in range(1000)])
    begun = asyncio.Event()
    running = asyncio.create_task(store.expire(NOW, 1, on_batch=lambda _: begun.set()))
    await begun.wait()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert lease(database) == []
    assert 0 < len(left(database)) < 1000
    await store.expire(NOW, 5000)
    assert left(database) == []


@only_sqlite
async def test_a_run_that_is_cancelled_as_it_takes_the_lease_gives_it_back(store, database):
    busy, free = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def be_busy(_):
        loop.call_soon_threadsafe(busy.set)
        free.wait(30)

    before = asyncio.ensure_future(store._database.run(be_busy))
    await busy.wait()
    running = asyncio.create_task(store.expire(NOW, 1))
    await asyncio.sleep(0)  # the lease is asked for, and will be taken whatever becomes of the run
    running.cancel()
    await asyncio.sleep(0)
    free.set()
    await asyncio.wait([before, running])
    assert running.cancelled()
    await store.count()  # all that was asked for before is done
    assert lease(database) == []


# The loop


class Metrics:
    def __init__(self):
        self.rows = 0
        self.errors = 0
        self.runs = []
        self.lags = []

    def expired(self, rows):
        self.rows += rows

    def expiry_run(self, finished_at, seconds):
        self.runs.append((finished_at, seconds))

    def record_error(self):
        self.errors += 1

    def expiry_lag(self, seconds):
        self.lags.append(seconds)


class Reports:
    """What the loop tells, to be waited for."""

    def __init__(self):
        self.runs = asyncio.Queue()
        self.errors = asyncio.Queue()
        self.progress = asyncio.Queue()

    def on_progress(self, rows, seconds, lag):
        self.progress.put_nowait(("progress", rows, seconds, lag))

    def on_behind(self, rows, seconds, lag):
        self.progress.put_nowait(("behind", rows, seconds, lag))

    def on_run(self, rows, seconds):
        self.runs.put_nowait(rows)

    def on_error(self, error):
        self.errors.put_nowait(error)


@pytest.fixture
async def make_loop(store, clock):
    loops = []

    def make(interval, **given):
        metrics, reports = Metrics(), Reports()
        loop = ExpiryLoop(
            store,
            metrics,
            interval,
            10,
            clock,
            on_run=reports.on_run,
            on_error=reports.on_error,
            on_progress=reports.on_progress,
            on_behind=reports.on_behind,
            look_every=0.001,
            **given,
        )
        loops.append(loop)
        return loop, metrics, reports

    yield make
    for loop in loops:
        await loop.stop()


async def test_the_loop_runs_at_once_and_again(store, clock, make_loop):
    await store.write([record(1, NOW), record(2, NOW + SECOND)])
    loop, metrics, reports = make_loop(0.001)
    loop.start()
    assert await reports.runs.get() == 1
    clock.now = NOW + SECOND
    while metrics.rows < 2:
        await reports.runs.get()
    await loop.stop()
    assert await store.count() == 0
    assert metrics.errors == 0
    assert {finished_at for finished_at, _ in metrics.runs} == {NOW.timestamp(), (NOW + SECOND).timestamp()}
    assert all(seconds > 0 for _, seconds in metrics.runs)


async def test_the_loop_waits_its_interval(make_loop):
    loop, metrics, reports = make_loop(3600)
    loop.start()
    await reports.runs.get()
    await asyncio.sleep(0.05)
    assert len(metrics.runs) == 1
    await loop.stop()


@only_sqlite
async def test_the_loop_survives_its_errors(store, database, make_loop):
    await store.write([record(1, NOW)])
    with closing(sqlite3.connect(database.path)) as raw:
        raw.execute(
            "CREATE TRIGGER broken BEFORE DELETE ON task_done BEGIN SELECT raise(FAIL, 'on purpose'); END"
        )
        raw.commit()
        loop, metrics, reports = make_loop(0.001)
        loop.start()
        for _ in range(2):
            error = await reports.errors.get()
            assert isinstance(error, StoreError)
            assert "on purpose" in str(error)
        assert metrics.errors >= 2
        assert metrics.runs == []
        raw.execute("DROP TRIGGER broken")
        raw.commit()
    while not metrics.rows:
        await reports.runs.get()
    assert await store.count() == 0


async def test_a_run_of_another_process_is_no_error(store, database, make_loop):
    await store.write([record(1, NOW)])
    database.execute("INSERT INTO task_done_state VALUES ('expiry', 'another', '2026-11-23 07:47:00.000000')")
    loop, metrics, _ = make_loop(3600)
    assert await loop.run_once() is False
    assert (metrics.errors, metrics.runs, metrics.rows) == (0, [], 0)
    assert left(database) == [1]


async def test_the_lease_of_a_process_that_died_costs_no_whole_interval(store, database, clock, make_loop):
    await store.write([record(1, NOW)])
    database.execute("INSERT INTO task_done_state VALUES ('expiry', 'dead', '2026-11-23 07:47:00.000000')")
    loop, metrics, reports = make_loop(3600, busy_pause=0.001)
    loop.start()
    await asyncio.sleep(0.01)
    assert metrics.runs == []
    clock.now = NOW + 60 * SECOND
    assert await reports.runs.get() == 1


async def test_a_store_that_is_busy_is_asked_again_after_a_short_interval(store, database, clock, make_loop):
    await store.write([record(1, NOW)])
    database.execute("INSERT INTO task_done_state VALUES ('expiry', 'dead', '2026-11-23 07:47:00.000000')")
    loop, metrics, reports = make_loop(0.001, busy_pause=3600)
    loop.start()
    await asyncio.sleep(0.01)
    assert metrics.runs == []
    clock.now = NOW + 60 * SECOND
    assert await asyncio.wait_for(reports.runs.get(), 60) == 1


@only_sqlite
async def test_rows_of_a_run_that_fails_later_are_counted(store, database, make_loop):
    await store.write(
        [record(number, NOW + number * timedelta(microseconds=1) - DAY) for number in range(30)]
    )
    with closing(sqlite3.connect(database.path)) as raw:
        raw.execute(
            "CREATE TRIGGER broken BEFORE DELETE ON task_done WHEN old.id = 25 "
            "BEGIN SELECT raise(ABORT, 'on purpose'); END"
        )
        raw.commit()
    loop, metrics, reports = make_loop(3600)
    assert await loop.run_once() is True
    assert (metrics.errors, metrics.runs) == (1, [])
    assert reports.errors.qsize() == 1
    assert 0 < metrics.rows < 25
    assert await store.count() == 30 - metrics.rows


async def test_stop_in_the_middle_of_a_run_leaves_the_rest(store, database, make_loop):
    await store.write([record(number, NOW) for number in range(1000)])
    loop, metrics, _ = make_loop(3600)
    loop.start()
    while not metrics.rows:
        await asyncio.sleep(0)
    await loop.stop()
    await loop.stop()
    assert 0 <= 1000 - metrics.rows - len(left(database)) <= 10
    assert lease(database) == []


@only_sqlite
async def test_stop_while_the_store_fails_waits_for_no_interval(store, database, make_loop):
    """The lease cannot be given back: that error comes out of the run instead of its cancellation."""
    await store.write([record(number, NOW) for number in range(1000)])
    loop, metrics, reports = make_loop(3600)
    loop.start()
    while not metrics.rows:
        await asyncio.sleep(0)
    with closing(sqlite3.connect(database.path)) as raw:
        raw.execute(
            "CREATE TRIGGER broken BEFORE DELETE ON task_done_state "
            "BEGIN SELECT raise(FAIL, 'on purpose'); END"
        )
        raw.commit()
    await asyncio.wait_for(loop.stop(), 60)
    assert "on purpose" in str(reports.errors.get_nowait())


async def test_stop_without_start(make_loop):
    loop, metrics, _ = make_loop(1)
    await loop.stop()
    assert metrics.runs == []


@pytest.mark.parametrize(("interval", "event"), [(3600, "progress"), (0.001, "behind")])
async def test_a_long_run_is_reported(store, make_loop, monkeypatch, interval, event):
    monkeypatch.setattr(expiry_module, "FIRST_REPORT_S", 0.001)
    await store.write([record(number, NOW - SECOND) for number in range(400)])
    loop, metrics, reports = make_loop(interval)
    loop._batch_size = 1
    loop.start()
    await reports.runs.get()
    await loop.stop()
    assert metrics.lags[-1] == 0.0
    assert max(metrics.lags) == 1.0
    told = [reports.progress.get_nowait() for _ in range(reports.progress.qsize())]
    assert {name for name, *_ in told} == {event}
    rows_told = [rows for _, rows, _, _ in told]
    assert rows_told == sorted(rows_told)
    # Each report waits twice as long as the one before: not one for each of the 400 batches.
    assert 0 < len(told) < 20
    for (_, _, earlier, _), (_, _, later, _) in itertools.pairwise(told):
        assert later > earlier


async def test_a_run_says_what_it_did_and_is_over(store, make_loop, monkeypatch):
    monkeypatch.setattr(expiry_module, "FIRST_REPORT_S", 0.0)
    await store.write([record(number, NOW) for number in range(30)])
    loop, metrics, reports = make_loop(3600)
    assert await loop.run_once() is True
    assert reports.runs.get_nowait() == 30
    assert metrics.lags == [0.0]
    assert reports.progress.empty()


@pytest.mark.parametrize(
    ("lasts", "first", "told"), [(100.0, 30.0, [30, 60]), (5000.0, 1000.0, [1000, *range(1600, 5000, 600)])]
)
async def test_reports_become_rarer_but_not_without_bound(store, make_loop, lasts, first, told):
    loop, _, reports = make_loop(3600)
    loop._run = expiry_module._Run(time.monotonic() - lasts, first)
    for _ in range(20):
        await loop.look()
    assert reports.progress.qsize() == len(told)


async def test_the_lag_is_seen_between_the_runs(store, clock, make_loop):
    loop, metrics, reports = make_loop(3600)
    loop.start()
    await reports.runs.get()
    await store.write([record(1, NOW)])
    clock.now = NOW + 7 * SECOND
    while metrics.lags[-1] != 7.0:
        await asyncio.sleep(0)
    await loop.stop()


async def test_a_look_that_fails_ends_nothing(store, make_loop):
    loop, metrics, reports = make_loop(3600)
    await store.close()
    await loop.look()
    assert metrics.lags == []
    assert reports.errors.empty()


async def test_what_nobody_foresaw_ends_neither_runs_nor_looks(store, database, make_loop, monkeypatch):
    await store.write([record(1, NOW - SECOND)])
    loop, metrics, reports = make_loop(0.001)

    def broken(_):
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(metrics, "expired", broken)
        loop.start()
        assert str(await asyncio.wait_for(reports.errors.get(), 60)) == "on purpose"
    await asyncio.wait_for(reports.runs.get(), 60)
    while not reports.errors.empty():
        reports.errors.get_nowait()
    with monkeypatch.context() as patched:
        patched.setattr(store, "expiry_lag", broken)
        assert str(await asyncio.wait_for(reports.errors.get(), 60)) == "on purpose"
    seen = len(metrics.lags)
    while len(metrics.lags) == seen:
        await asyncio.sleep(0)
    await loop.stop()
    assert metrics.errors > 0
