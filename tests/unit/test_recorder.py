"""No row is lost and nobody waits for ever, whatever store and spool do."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.records import recorder as recorder_module
from relay.records import spooler as spooler_module
from relay.records.identity import uuid7
from relay.records.model import Doubt, Entry, Record, Settled
from relay.records.recorder import MAX_BATCH, Recorder
from relay.records.spool import Spool
from relay.records.spool_line import decode, encode
from relay.records.spooler import USUAL_PLACE
from relay.records.store import RejectedRecordError, StoreError
from tests.support.rows import make_record

LONG = 3600.0  # a limit that no test reaches
SHORT = 0.02  # a limit that the test waits for; being late does not matter


def make_doubt(record: Record) -> Doubt:
    return Doubt(
        task_id=record.task_id,
        task_type=record.task_type,
        sender=record.sender,
        client=record.client,
        since=record.sent_at,
        upstream=record.upstream,
        reason="no answer",
        size=record.size,
        duration_ms=record.duration_ms,
        recipients=record.recipients,
    )


class MemoryStore:
    """Rows by task_id, as the real store keeps them; each write does what `behave` says at that moment."""

    def __init__(self) -> None:
        self.rows: dict[UUID, Record] = {}
        self.doubts: dict[UUID, Doubt] = {}
        self.commits: list[list[UUID]] = []
        self.calls = 0
        self.in_flight = self.most_in_flight = self.longest = 0
        self.failure: Exception | None = None
        self.rejected: set[UUID] = set()
        self.open = asyncio.Event()  # not set: a write hangs, and commits late
        self.open.set()
        self.called = asyncio.Event()

    async def write(self, records: Sequence[Entry]) -> None:
        self.calls += 1
        self.in_flight += 1
        self.called.set()
        try:
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.longest = max(self.longest, len(records))
            await asyncio.sleep(0)
            await self.open.wait()
            if self.failure is not None:
                raise self.failure
            if any(record.task_id in self.rejected for record in records):
                raise RejectedRecordError("value too long")
            self.commits.append([record.task_id for record in records])
            for entry in records:
                if isinstance(entry, Record):
                    self.rows[entry.task_id] = entry
                if isinstance(entry, Doubt):
                    if entry.task_id not in self.rows:
                        self.doubts[entry.task_id] = entry
                elif isinstance(entry, Settled) or entry.doubted:
                    self.doubts.pop(entry.task_id, None)
        finally:
            self.in_flight -= 1


class Counts:
    """What the recorder reported."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.batches: list[int] = []
        self.errors = 0
        self.pending = 0
        self.most_pending = 0
        self.spooled = 0
        self.reserve = 0

    def row_recorded(self, task_type: str) -> None:
        self.types.append(task_type)

    def committed(self, rows: int, seconds: float) -> None:
        assert seconds >= 0
        self.batches.append(rows)

    def record_error(self) -> None:
        self.errors += 1

    def records_pending(self, rows: int) -> None:
        self.pending = rows
        self.most_pending = max(self.most_pending, rows)

    def records_spooled(self, rows: int) -> None:
        self.spooled = rows

    def records_reserve(self, octets: int) -> None:
        self.reserve = octets


class Bench:
    """A recorder with its neighbours."""

    def __init__(
        self, directory: Path, store: MemoryStore, commit_timeout: float = LONG, probe_pause: float = 0.001
    ) -> None:
        self.store = store
        self.spool = Spool(directory)
        self.counts = Counts()
        self.lost: list[Entry] = []
        self.recorder = Recorder(
            store,
            self.spool,
            self.counts,
            commit_timeout=commit_timeout,
            log_lost=self.lost.append,
            probe_pause=probe_pause,
        )

    def set_aside(self) -> list[UUID]:
        if not self.spool.rejected_file.exists():
            return []
        return [decode(line).task_id for line in self.spool.rejected_file.read_bytes().splitlines()]


@asynccontextmanager
async def bench(
    directory: Path,
    store: MemoryStore | None = None,
    *,
    commit_timeout: float = LONG,
    probe_pause: float = 0.001,
) -> AsyncIterator[Bench]:
    made = Bench(directory, store or MemoryStore(), commit_timeout, probe_pause)
    made.recorder.start()
    try:
        yield made
    finally:
        await made.recorder.close(10)
        made.spool.close()
    assert not {task.get_name() for task in asyncio.all_tasks()} & {
        "recorder",
        "spool replay",
        "spool reserve",
    }
    assert made.store.most_in_flight <= 1
    assert made.store.longest <= MAX_BATCH


async def until(condition: Callable[[], bool]) -> None:
    """Poll: the state that tests wait for has no event of its own. pytest's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.001)


def spooled(directory: Path) -> list[UUID]:
    """The rows in the segments of a closed spool, in order."""
    names = sorted(path for path in directory.iterdir() if path.name[0].isdigit())
    return [decode(line).task_id for name in names for line in name.read_bytes().splitlines()]


@contextmanager
def broken_disk(directory: Path) -> Iterator[None]:
    """The files of the spool, which hold no rows yet, are gone, and something is in the way of the next."""
    segments = sorted(path for path in directory.iterdir() if path.name[0].isdigit())
    for segment in segments:
        segment.unlink()
    obstacle = directory / f"{int(segments[-1].stem) + 1:012}.jsonl"
    obstacle.mkdir()
    try:
        yield
    finally:
        obstacle.rmdir()


# ---- group commit


async def test_a_row_alone_is_committed_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        row = make_record()
        await it.recorder.record(row)

        assert it.store.rows == {row.task_id: row}
        assert it.counts.types == ["mention"]
        assert it.counts.batches == [1]
        assert it.counts.pending == 0
        assert it.recorder.refusal() is None
    assert it.spool.rows == 0


async def test_the_order_is_that_of_the_calls_whoever_awaits_when(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.open.clear()
        rows = [make_record() for _ in range(5)]
        waiting = [it.recorder.record(row) for row in rows]
        it.store.open.set()
        for kept in reversed(waiting):
            await kept
        assert [key for commit in it.store.commits for key in commit] == [row.task_id for row in rows]


async def test_only_rows_of_accepted_messages_are_counted(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        row = make_record()
        await it.recorder.record(make_doubt(row))
        assert it.store.doubts.keys() == {row.task_id}
        it.recorder.record(make_doubt(make_record()))
        await it.recorder.record(replace(row, doubted=True))
        await it.recorder.record(Settled(uuid7()))
        assert it.counts.types == ["mention"]
        assert it.counts.errors == 0
        assert it.store.rows.keys() == {row.task_id}
        assert row.task_id not in it.store.doubts


async def test_doubts_and_their_ends_go_through_the_spool_in_order(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        accepted, refused, open_still = (make_record() for _ in range(3))
        it.store.failure = StoreError("away")
        for row in (accepted, refused, open_still):
            await it.recorder.record(make_doubt(row))
        await it.recorder.record(accepted)  # what comes from the spool ends a doubt, whether marked or not
        await it.recorder.record(Settled(refused.task_id))
        assert it.spool.rows == 5
        assert it.counts.types == ["mention"]
        it.store.failure = None
        await until(lambda: not it.spool.rows)
        assert it.store.rows.keys() == {accepted.task_id}
        assert it.store.doubts.keys() == {open_still.task_id}


async def test_what_nothing_takes_goes_to_the_log_whatever_its_kind(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        row = make_record()
    lost: list[Entry] = [row, make_doubt(row), Settled(row.task_id)]
    for entry in lost:
        await it.recorder.record(entry)  # closed
    assert it.lost == lost
    assert it.counts.errors == 3


async def test_while_one_commit_is_in_flight_the_next_batch_collects(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.open.clear()
        rows = [make_record() for _ in range(10)]
        first = asyncio.ensure_future(it.recorder.record(rows[0]))
        await it.store.called.wait()
        others = [asyncio.ensure_future(it.recorder.record(row)) for row in rows[1:]]
        await asyncio.sleep(0)
        assert not first.done()
        it.store.open.set()
        await asyncio.gather(first, *others)

        assert it.store.commits == [[rows[0].task_id], [row.task_id for row in rows[1:]]]
        assert it.counts.batches == [1, 9]


async def test_a_limit_that_changes_holds_for_the_write_that_is_in_flight(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.open.clear()
        kept = it.recorder.record(make_record())
        await it.store.called.wait()
        it.recorder._look_at_write()  # by the timer of an earlier one
        assert it.recorder._awaited
        it.recorder.follow(commit_timeout=SHORT, refuse_while_away=False)
        async with asyncio.timeout(60):
            await kept
        assert it.spool.rows == 1
        it.store.open.set()


async def test_who_waited_hears_of_it_before_the_next_batch_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a doubt has left the journal before its end can be durable."""
    async with bench(tmp_path) as it:
        happened = []
        write = it.store.write

        def watched(records: Sequence[Entry]) -> Awaitable[None]:
            happened.append(len(records))
            return write(records)

        monkeypatch.setattr(it.store, "write", watched)
        it.store.open.clear()
        first = it.recorder.record(make_record())
        first.add_done_callback(lambda _: happened.append("first"))
        await it.store.called.wait()
        others = [it.recorder.record(make_record()) for _ in range(2)]
        it.store.open.set()
        await asyncio.gather(first, *others)
        assert happened == [1, "first", 2]


async def test_batches_are_bounded_and_in_order(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        rows = [make_record() for _ in range(2 * MAX_BATCH + 1)]
        await asyncio.gather(*(it.recorder.record(row) for row in rows))

        assert [len(commit) for commit in it.store.commits] == [MAX_BATCH, MAX_BATCH, 1]
        assert [task_id for commit in it.store.commits for task_id in commit] == [row.task_id for row in rows]
        assert it.counts.most_pending == len(rows)
        assert it.counts.pending == 0


async def test_nobody_is_released_before_the_commit(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.open.clear()
        waiting = asyncio.ensure_future(it.recorder.record(make_record()))
        await it.store.called.wait()
        for _ in range(20):
            await asyncio.sleep(0)

        assert not waiting.done()
        it.store.open.set()
        await waiting


async def test_a_cancelled_caller_leaves_its_row(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.open.clear()
        rows = [make_record() for _ in range(3)]
        waiting = [asyncio.ensure_future(it.recorder.record(row)) for row in rows]
        await it.store.called.wait()
        waiting[1].cancel()
        await asyncio.wait({waiting[1]})
        it.store.open.set()
        await asyncio.gather(waiting[0], waiting[2])

        assert waiting[1].cancelled()
        assert list(it.store.rows) == [row.task_id for row in rows]


# ---- the store is away


@pytest.mark.parametrize("failure", [StoreError("database is locked"), RuntimeError("a defect")])
async def test_a_failing_store_sends_rows_to_the_spool(tmp_path: Path, failure: Exception) -> None:
    async with bench(tmp_path, probe_pause=LONG) as it:
        it.store.failure = failure
        rows = [make_record() for _ in range(3)]
        for row in rows:
            await it.recorder.record(row)

        assert it.store.calls == 1  # the rows that follow do not even try
        assert it.counts.spooled == 3
        assert it.counts.types == ["mention"] * 3
        assert it.counts.errors == 0
        assert it.recorder.refusal() is None
    assert spooled(tmp_path) == [row.task_id for row in rows]


async def test_the_store_comes_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        rows = [make_record() for _ in range(5)]
        for row in rows:
            await it.recorder.record(row)
        it.store.failure = None
        await until(lambda: len(it.store.rows) == 5)
        await until(lambda: it.counts.spooled == 0)
        await until(lambda: it.spool.complete)  # the file that was replayed has gone, and there is another
        last = make_record()
        await it.recorder.record(last)
        await until(lambda: last.task_id in it.store.rows)

        assert list(it.store.rows) == [row.task_id for row in [*rows, last]]
        assert it.counts.types == ["mention"] * 6  # each row once
    assert spooled(tmp_path) == []


async def test_a_hanging_store_holds_nobody(tmp_path: Path) -> None:
    async with bench(tmp_path, commit_timeout=SHORT) as it:
        it.store.open.clear()
        rows = [make_record() for _ in range(3)]
        await asyncio.gather(*(it.recorder.record(row) for row in rows))
        more = make_record()
        await it.recorder.record(more)

        assert it.store.rows == {}
        assert it.counts.spooled == 4
        it.store.open.set()  # the late commit; then the replay
        await until(lambda: it.counts.spooled == 0)
        assert list(it.store.rows) == [row.task_id for row in [*rows, more]]
        assert it.counts.types == ["mention"] * 4
    assert spooled(tmp_path) == []


async def test_rows_that_arrive_during_the_replay_follow_it(tmp_path: Path) -> None:
    """The replay hangs in the store; the message path goes on, through the spool."""
    rows = [make_record() for _ in range(2 * MAX_BATCH)]
    left_over = Spool(tmp_path)
    left_over.append([encode(row) for row in rows])
    left_over.close()
    store = MemoryStore()
    store.open.clear()
    async with bench(tmp_path, store) as it:
        await store.called.wait()
        more = [make_record() for _ in range(3)]
        for row in more:
            await it.recorder.record(row)
        assert store.rows == {}
        store.open.set()
        await until(lambda: it.counts.spooled == 0)
        last = make_record()
        await it.recorder.record(last)

        await until(lambda: last.task_id in store.rows)
        assert list(store.rows) == [row.task_id for row in [*rows, *more, last]]


async def test_a_restart_replays_what_was_left(tmp_path: Path) -> None:
    async with bench(tmp_path, probe_pause=LONG) as before:
        before.store.failure = StoreError("gone")
        rows = [make_record() for _ in range(3)]
        for row in rows:
            await before.recorder.record(row)
    async with bench(tmp_path) as after:
        await until(lambda: len(after.store.rows) == 3 and after.counts.spooled == 0)

        assert list(after.store.rows.values()) == rows
        assert after.counts.types == []  # counted by the process that made them durable
    assert spooled(tmp_path) == []


async def test_a_store_too_slow_for_those_who_wait_still_gets_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each write takes longer than commit_timeout: rows go through the spool until it is quick again."""
    store = MemoryStore()
    write = store.write

    async def slow(records: Sequence[Record]) -> None:
        await asyncio.sleep(3 * SHORT)
        await write(records)

    monkeypatch.setattr(store, "write", slow)
    async with bench(tmp_path, store, commit_timeout=SHORT) as it:
        for _ in range(3):
            await it.recorder.record(make_record())
        await until(lambda: len(store.rows) == 3 and it.counts.spooled == 0)
        for _ in range(3):
            await it.recorder.record(make_record())
        await until(lambda: len(store.rows) == 6 and it.counts.spooled == 0)
        assert "rows go to the store again" not in caplog.text
        monkeypatch.setattr(store, "write", write)
        it.recorder._commit_timeout = LONG  # a slow machine is no slow store
        await until(lambda: "rows go to the store again" in caplog.text)


async def test_a_probe_of_a_hanging_store_never_holds_the_message_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the row that sent the others to the spool is not there yet as the store is probed."""
    async with bench(tmp_path) as it:
        loop = asyncio.get_running_loop()
        append = it.spool.append
        go_on = asyncio.Event()

        def slow(lines: Sequence[bytes]) -> None:
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            append(lines)

        monkeypatch.setattr(it.spool, "append", slow)
        it.store.failure = StoreError("gone")
        rows = [make_record() for _ in range(2)]
        first = asyncio.ensure_future(it.recorder.record(rows[0]))
        await asyncio.sleep(SHORT)  # time for a probe, which finds nothing to try the store with
        it.store.open.clear()
        go_on.set()
        await first
        await until(lambda: it.store.in_flight == 1)
        await it.recorder.record(rows[1])
        it.store.failure = None
        it.store.open.set()
        await until(lambda: len(it.store.rows) == 2)


async def test_a_store_that_fails_at_the_last_step_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    rows = [make_record() for _ in range(3)]
    write = store.write

    async def fails_once(records: Sequence[Record]) -> None:
        monkeypatch.setattr(store, "write", write)
        raise StoreError("gone again")

    store.failure = StoreError("gone")
    async with bench(tmp_path, store) as it:
        await it.recorder.record(rows[0])
        store.open.clear()
        store.failure = None
        await until(lambda: store.in_flight == 1)  # the probe, with the first row
        await it.recorder.record(rows[1])
        monkeypatch.setattr(store, "write", fails_once)
        store.open.set()
        await until(lambda: it.counts.spooled == 0)
        await it.recorder.record(rows[2])

        await until(lambda: len(store.rows) == 3)
        assert store.write == write  # it did fail
        assert list(store.rows) == [row.task_id for row in rows]
    assert spooled(tmp_path) == []


async def test_a_spool_that_cannot_be_read_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row, more = make_record(), make_record()
    directory, elsewhere = tmp_path / "spool", tmp_path / "elsewhere"
    directory.mkdir()
    (directory / "000000000001.jsonl").write_bytes(encode(row))
    made = Bench(directory, MemoryStore())
    directory.rename(elsewhere)
    made.recorder.start()
    await made.recorder.record(more)
    await until(lambda: "replay: spool" in caplog.text)
    elsewhere.rename(directory)
    await until(lambda: made.counts.spooled == 0)

    assert list(made.store.rows) == [row.task_id, more.task_id]
    await made.recorder.close(10)
    made.spool.close()


async def test_the_spool_takes_rows_where_no_more_threads_are_to_be_had(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.store.failure = StoreError("the store is away")
        usual = threading.stack_size(1 << 45)  # more than there can be: no thread can begin
        try:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                threading.Thread(target=print).start()
            row = make_record()
            await made.recorder.record(row)
        finally:
            threading.stack_size(usual)
        assert made.lost == []
        made.store.failure = None
        await until(lambda: row.task_id in made.store.rows)


async def test_a_segment_that_somebody_has_removed_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segment = tmp_path / "000000000001.jsonl"
    segment.write_bytes(encode(make_record()))
    made = Bench(tmp_path, MemoryStore())
    segment.unlink()
    made.recorder.start()
    more = [make_record(), make_record()]
    await made.recorder.record(more[0])
    await until(lambda: made.recorder.away() is None)
    await made.recorder.record(more[1])

    assert list(made.store.rows) == [row.task_id for row in more]
    assert made.counts.errors == 1
    assert "was removed under the relay; rows that waited in it: 1" in caplog.text
    await made.recorder.close(10)
    made.spool.close()


async def test_a_write_that_never_ends_is_cancelled_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_REPLAY_TIMEOUT_S", SHORT)
    store = MemoryStore()
    write = store.write
    dead = asyncio.Event()

    async def first_hangs(records: Sequence[Record]) -> None:
        if not dead.is_set():
            dead.set()
            await asyncio.Event().wait()
        await write(records)

    monkeypatch.setattr(store, "write", first_hangs)
    async with bench(tmp_path, store, commit_timeout=SHORT) as it:
        row = make_record()
        await it.recorder.record(row)
        await until(lambda: row.task_id in store.rows)
        await until(lambda: it.counts.spooled == 0)


async def test_corrupt_lines_in_the_replay_are_counted(tmp_path: Path) -> None:
    row = make_record()
    (tmp_path / "000000000001.jsonl").write_bytes(b"rubbish\n" + encode(row) + encode(row)[:50])
    async with bench(tmp_path) as it:
        await until(lambda: it.counts.spooled == 0)

        assert list(it.store.rows) == [row.task_id]
        assert it.counts.errors == 2
    assert it.spool.corrupt_file.read_bytes() == b"rubbish\n" + encode(row)[:50] + b"\n"


# ---- rows that the store will not take


async def test_rejected_rows_are_set_aside_and_the_rest_proceeds(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        rows = [make_record() for _ in range(20)]
        bad = [rows[0], rows[7], rows[8], rows[19]]
        it.store.rejected = {row.task_id for row in bad}
        await asyncio.gather(*(it.recorder.record(row) for row in rows))

        good = [row.task_id for row in rows if row not in bad]
        assert list(it.store.rows) == good
        assert it.set_aside() == [row.task_id for row in bad]
        assert it.counts.errors == 4
        assert len(it.counts.types) == 16
        assert it.lost == []
        assert it.recorder.refusal() is None


async def test_rejected_rows_in_the_replay(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        rows = [make_record() for _ in range(5)]
        for row in rows:
            await it.recorder.record(row)
        it.store.rejected = {rows[2].task_id}
        it.store.failure = None
        await until(lambda: it.counts.spooled == 0)

        assert list(it.store.rows) == [row.task_id for row in rows if row is not rows[2]]
        assert it.set_aside() == [rows[2].task_id]
        assert it.counts.errors == 1


async def test_a_store_that_fails_between_rejections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was set aside is not set aside again when the rest is replayed."""
    store = MemoryStore()
    rows = [make_record() for _ in range(8)]
    store.rejected = {rows[0].task_id, rows[7].task_id}
    write = store.write

    async def fails_once(records: Sequence[Record]) -> None:
        if records[0] is rows[1]:
            monkeypatch.setattr(store, "write", write)
            raise StoreError("gone")
        await write(records)

    monkeypatch.setattr(store, "write", fails_once)
    async with bench(tmp_path, store) as it:
        await asyncio.gather(*(it.recorder.record(row) for row in rows))
        await until(lambda: len(store.rows) == 6)
        await until(lambda: it.counts.spooled == 0)

        assert list(store.rows) == [row.task_id for row in rows[1:7]]
        assert it.set_aside() == [rows[0].task_id, rows[7].task_id]


async def test_a_store_that_hangs_behind_a_rejection_holds_nobody(tmp_path: Path) -> None:
    class Hanging(MemoryStore):
        async def write(self, records: Sequence[Entry]) -> None:
            try:
                await super().write(records)
            except RejectedRecordError:
                self.open.clear()
                raise

    async with bench(tmp_path, Hanging(), commit_timeout=SHORT) as it:
        rows = [make_record() for _ in range(3)]
        it.store.rejected.add(rows[0].task_id)
        async with asyncio.timeout(30):
            await asyncio.gather(*[it.recorder.record(row) for row in rows])

        assert it.spool.rows == 3
        assert it.lost == []


async def test_a_rejected_row_that_cannot_be_set_aside_is_logged(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.spool.rejected_file.mkdir()
        row = make_record()
        it.store.rejected = {row.task_id}
        await it.recorder.record(row)

        assert it.lost == [row]
        assert it.counts.errors == 1
        assert it.recorder.refusal() is None  # other rows can be kept
        it.spool.rejected_file.rmdir()


# ---- the spool fails, too


async def test_neither_store_nor_spool(tmp_path: Path) -> None:
    async with bench(tmp_path, probe_pause=LONG) as it:
        it.store.failure = StoreError("gone")
        row = make_record()
        with broken_disk(tmp_path):
            await it.recorder.record(row)

            assert it.lost == [row]
            assert it.counts.errors == 1
            assert it.counts.types == []
            refusal = it.recorder.refusal()
            assert refusal is not None
            assert refusal.startswith("gone; spool ")
        kept = make_record()
        await it.recorder.record(kept)  # of a transaction that was under way: the spool works again
        await until(lambda: it.recorder.refusal() is None)
    assert spooled(tmp_path) == [kept.task_id]


async def test_of_what_only_the_log_has_so_many_rows_are_tried_again(tmp_path: Path) -> None:
    """Memory has a bound, however long nothing takes rows."""
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        rows = [make_record() for _ in range(1200)]
        with broken_disk(tmp_path):
            await asyncio.gather(*[it.recorder.record(row) for row in rows])
            assert it.lost == rows
        it.store.failure = None
        await until(lambda: it.recorder.away() is None)

        assert list(it.store.rows) == [row.task_id for row in rows[:1000]]


async def test_the_spool_is_probed_with_the_row_that_was_lost(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        row = make_record()
        with broken_disk(tmp_path):
            await it.recorder.record(row)
            calls = it.store.calls
            await until(lambda: it.store.calls > calls + 1)
            assert it.recorder.refusal() is not None
        await until(lambda: it.recorder.refusal() is None)

        assert it.counts.spooled == 1
        assert it.counts.types == ["mention"]
    assert spooled(tmp_path) == [row.task_id]


async def test_a_doubt_that_only_memory_has_does_not_come_behind_its_end(tmp_path: Path) -> None:
    """The spool takes the end before the held doubt is tried again: the message would stay in doubt."""
    async with bench(tmp_path, probe_pause=LONG) as it:  # nothing is tried again while this goes on
        it.store.failure = StoreError("gone")
        refused, open_still = make_record(), make_record()
        with broken_disk(tmp_path):
            for row in (refused, open_still):
                await it.recorder.record(make_doubt(row))
            assert len(it.lost) == 2
        await it.recorder.record(Settled(refused.task_id))
        assert spooled(tmp_path) == [refused.task_id]
        it.store.failure = None
        await it.recorder._catch_up()
        assert it.store.doubts.keys() == {open_still.task_id}


async def test_a_doubt_that_ends_while_it_is_tried_again_does_not_come_behind_its_end(tmp_path: Path) -> None:
    async with bench(tmp_path, probe_pause=LONG) as it:
        it.store.failure = StoreError("gone")
        refused = make_record()
        with broken_disk(tmp_path):
            await it.recorder.record(make_doubt(refused))
        await it.recorder.record(make_record())  # the spool is back
        it.store.failure = None
        assert await it.recorder._replay_batch(LONG)
        it.store.open.clear()
        it.store.called.clear()
        trying = asyncio.ensure_future(it.recorder._replay_batch(LONG))
        await it.store.called.wait()
        await it.recorder.record(Settled(refused.task_id))
        it.store.failure = StoreError("gone again")
        it.store.open.set()
        assert not await trying
        it.store.failure = None
        await it.recorder._catch_up()
        assert it.store.doubts == {}


async def test_the_store_alone_comes_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        row = make_record()
        with broken_disk(tmp_path):
            await it.recorder.record(row)
            it.store.failure = None
            await until(lambda: it.recorder.away() is None)

            assert list(it.store.rows) == [row.task_id]
            await it.recorder.record(make_record())
            assert len(it.store.rows) == 2
            refusal = it.recorder.refusal()
            assert refusal is not None
            assert refusal.startswith("no disk space to take ahead: spool ")
        await until(lambda: it.recorder.refusal() is None)
        assert it.lost == [row]
        assert it.counts.types == ["mention"] * 2


async def test_a_spool_that_failed_long_ago_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        with broken_disk(tmp_path):
            await it.recorder.record(make_record())
            it.store.failure = None
            await until(lambda: bool(it.store.rows))
        await until(lambda: it.recorder.refusal() is None)
        it.store.failure = StoreError("gone again")
        append = it.spool.append
        refusals: list[str | None] = []

        def watched(lines: Sequence[bytes]) -> None:
            refusals.append(it.recorder.refusal())
            append(lines)

        monkeypatch.setattr(it.spool, "append", watched)
        await it.recorder.record(make_record())

        assert refusals == [None]


async def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooler_module, "_ANSWER_TIMEOUT_S", SHORT)
    async with bench(tmp_path, probe_pause=LONG) as it:
        it.store.failure = StoreError("gone")
        answer = asyncio.Event()
        loop = asyncio.get_running_loop()
        append = it.spool.append

        def stalled(lines: Sequence[bytes]) -> None:
            asyncio.run_coroutine_threadsafe(answer.wait(), loop).result()
            append(lines)

        monkeypatch.setattr(it.spool, "append", stalled)
        rows = [make_record() for _ in range(2)]
        for row in rows:
            await it.recorder.record(row)  # the second does not wait at all

        assert it.lost == rows
        refusal = it.recorder.refusal()
        assert refusal is not None
        assert "does not answer" in refusal
        answer.set()
        await until(lambda: it.spool.rows == 1)
        # It answers again, and is asked again.
        monkeypatch.setattr(spooler_module, "_ANSWER_TIMEOUT_S", LONG)
        await it.recorder.record(make_record())
        assert it.lost == rows
        assert it.spool.rows > 1
        assert it.recorder.refusal() is None


async def test_a_row_that_json_cannot_carry_does_not_take_others_along(tmp_path: Path) -> None:
    async with bench(tmp_path, probe_pause=LONG) as it:
        it.store.failure = StoreError("gone")
        rows = [make_record() for _ in range(3)]
        rows[1].data["number"] = 10**5000  # more digits than Python writes
        await asyncio.gather(*(it.recorder.record(row) for row in rows))

        assert it.lost == [rows[1]]
        assert it.recorder.refusal() is None
    assert spooled(tmp_path) == [rows[0].task_id, rows[2].task_id]


async def test_nothing_to_replay_after_a_row_that_json_cannot_carry(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        row = make_record()
        row.data["number"] = 10**5000
        await it.recorder.record(row)
        it.store.failure = None
        last = make_record()
        await it.recorder.record(last)

        await until(lambda: last.task_id in it.store.rows)
        assert it.lost == [row]


async def test_a_defect_in_the_metrics_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(tmp_path) as it:

        def broken(*arguments: object) -> None:
            raise ValueError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(it.counts, "committed", broken)
            row = make_record()
            await it.recorder.record(row)
            assert it.lost == [row]
            it.store.failure = StoreError("gone")
            await it.recorder.record(make_record())
            it.store.failure = None
            await until(lambda: "unforeseen error in the replay" in caplog.text)
        await until(lambda: it.counts.spooled == 0)
        last = make_record()
        await it.recorder.record(last)

        await until(lambda: last.task_id in it.store.rows)
        assert len(it.store.rows) == 3


async def test_a_log_that_fails_still_releases_the_caller(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    store = MemoryStore()
    store.failure = StoreError("gone")

    def broken(record: Record) -> None:
        raise OSError("stderr is gone")

    recorder = Recorder(store, spool, Counts(), commit_timeout=LONG, log_lost=broken, probe_pause=LONG)
    recorder.start()
    with broken_disk(tmp_path):
        await recorder.record(make_record())

    assert recorder.refusal() is not None
    await recorder.close(10)
    spool.close()


# ---- close


async def test_close_commits_what_waits(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        rows = [make_record() for _ in range(3)]
        waiting = [asyncio.ensure_future(it.recorder.record(row)) for row in rows]
        await asyncio.sleep(0)
        await it.recorder.close(10)

        assert all(task.done() for task in waiting)
        assert list(it.store.rows) == [row.task_id for row in rows]


async def test_close_does_not_wait_for_a_hanging_store(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.store.open.clear()
        rows = [make_record() for _ in range(3)]
        waiting = [asyncio.ensure_future(it.recorder.record(rows[0]))]
        await it.store.called.wait()
        waiting += [asyncio.ensure_future(it.recorder.record(row)) for row in rows[1:]]
        await asyncio.sleep(0)
        close = asyncio.create_task(it.recorder.close(1))
        await asyncio.gather(close, *waiting)

        assert it.store.in_flight == 0
        assert it.lost == []
    assert spooled(tmp_path) == [row.task_id for row in rows]


async def test_close_is_bounded_when_the_disk_hangs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as it:
        it.store.failure = StoreError("gone")
        answer = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stalled(lines: Sequence[bytes]) -> None:
            asyncio.run_coroutine_threadsafe(answer.wait(), loop).result()

        monkeypatch.setattr(it.spool, "append", stalled)
        rows = [make_record() for _ in range(2)]
        first = asyncio.ensure_future(it.recorder.record(rows[0]))
        await it.store.called.wait()
        second = asyncio.ensure_future(it.recorder.record(rows[1]))
        await asyncio.sleep(0)
        await it.recorder.close(SHORT)
        await asyncio.gather(first, second)

        assert it.lost == rows
        assert it.counts.errors == 2
        answer.set()


async def test_a_row_after_close_is_logged(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await it.recorder.close(10)
        row = make_record()
        await it.recorder.record(row)

        assert it.lost == [row]


async def test_close_before_start(tmp_path: Path) -> None:
    made = Bench(tmp_path, MemoryStore())
    await made.recorder.close(10)
    made.spool.close()

    assert made.recorder.refusal() is None


# ---- the reserve


async def test_a_place_is_promised_once_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooler_module, "_LARGEST_RESERVE", 0)  # it does not grow
    async with bench(tmp_path) as it:
        free = it.counts.reserve
        assert it.recorder.promise(free)
        assert not it.recorder.promise(1)
        it.recorder.release(free)
        assert it.recorder.promise(1)


async def test_the_reserve_grows_before_it_is_used_up(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        usual = it.counts.reserve
        assert it.recorder.promise(usual // 2)
        await asyncio.sleep(SHORT)
        assert it.counts.reserve == usual
        assert it.recorder.promise(1)
        await until(lambda: it.counts.reserve > usual)
        assert it.recorder.refusal() is None
        assert it.recorder.promise(usual)


async def test_rows_that_are_written_are_made_up_for(tmp_path: Path) -> None:
    async with bench(tmp_path, probe_pause=LONG) as it:
        usual = it.counts.reserve
        it.store.failure = StoreError("gone")
        for rows in (1, 2):
            await it.recorder.record(replace(make_record(), sender="x" * (usual // 2)))
            await until(lambda: it.counts.reserve == usual)
            assert it.spool.rows == rows


async def test_no_disk_space_refuses_new_mail_while_the_store_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not before less than a usual place is left, and no longer than it lasts."""
    monkeypatch.setattr(spooler_module, "_RESERVE_PAUSE_S", 0.001)

    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with bench(tmp_path) as it:
        usual = it.counts.reserve
        with monkeypatch.context() as disk:
            disk.setattr(os, "posix_fallocate", full)
            assert it.recorder.promise(usual - USUAL_PLACE)
            await until(lambda: "no disk space to take ahead" in caplog.text)
            assert it.recorder.refusal() is None
            assert it.recorder.promise(1)
            refusal = it.recorder.refusal()
            assert refusal == f"no disk space to take ahead: spool {tmp_path}: No space left on device"
            row = make_record()
            await it.recorder.record(row)
            assert row.task_id in it.store.rows
            it.recorder.release(usual - USUAL_PLACE)
            assert it.recorder.refusal() is None
        await until(lambda: "the reserve is whole again" in caplog.text)
    assert caplog.text.count("no disk space to take ahead") == 1


async def test_a_start_without_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooler_module, "_RESERVE_PAUSE_S", 0.001)

    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", full)
        made = Bench(tmp_path, MemoryStore())
        made.recorder.start()
        assert made.recorder.refusal() is not None
        assert not made.recorder.promise(1)
    await until(lambda: made.recorder.refusal() is None)
    assert made.recorder.promise(1)
    await made.recorder.close(10)
    made.spool.close()


# ---- the process is killed

KILLED = """
import asyncio, pathlib, sys
from test_recorder import Bench, MemoryStore, make_record
from relay.records.store import StoreError

async def sender(it):
    while True:
        row = make_record()
        await it.recorder.record(row)
        print(row.task_id, flush=True)

async def main():
    store = MemoryStore()
    store.failure = StoreError("gone")
    it = Bench(pathlib.Path(sys.argv[1]), store)
    it.recorder.start()
    await asyncio.gather(*(sender(it) for _ in range(20)))

asyncio.run(main())
"""


@pytest.mark.parametrize("after", [1, 30, 500])
async def test_sigkill_loses_no_row_that_was_released(tmp_path: Path, after: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs meanwhile
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(after)]
        process.kill()
        said += process.stdout.readlines()
    async with bench(tmp_path) as it:
        await until(lambda: it.counts.spooled == 0)

    assert len(said) >= after
    assert {UUID(line.strip()) for line in said if line.endswith("\n")} <= set(it.store.rows)


# ---- any order of events

ACTIONS = ["record", "record", "burst", "reject", "cancel", "ok", "fail", "hang", "yield", "wait"]


@given(st.lists(st.sampled_from(ACTIONS), max_size=30))
@settings(deadline=None)
def test_every_row_is_in_one_place(actions: list[str]) -> None:
    """After any interleaving each row is in store, spool or rejected file; after a replay in one, once."""
    with TemporaryDirectory() as directory:
        asyncio.run(interleave(Path(directory), actions))


async def interleave(directory: Path, actions: list[str]) -> None:
    store = MemoryStore()
    made: list[UUID] = []
    waiting: list[asyncio.Task[None]] = []
    async with bench(directory, store, commit_timeout=0.005, probe_pause=0.0005) as it:
        for action in actions:
            match action:
                case "record" | "burst" | "reject" | "cancel":
                    for _ in range(7 if action == "burst" else 1):
                        row = make_record()
                        made.append(row.task_id)
                        if action == "reject":
                            store.rejected.add(row.task_id)
                        waiting.append(asyncio.ensure_future(it.recorder.record(row)))
                    if action == "cancel":
                        await asyncio.sleep(0)
                        waiting.pop().cancel()
                case "ok":
                    store.failure = None
                    store.open.set()
                case "fail":
                    store.failure = StoreError("gone")
                    store.open.set()
                case "hang":
                    store.open.clear()
                case "yield":
                    await asyncio.sleep(0)
                case "wait":
                    await asyncio.sleep(0.002)
        await asyncio.gather(*waiting)
    spool_rows, set_aside = spooled(directory), it.set_aside()

    assert it.lost == []
    assert set(spool_rows) | set(store.rows) | set(set_aside) == set(made)
    assert len(spool_rows) == len(set(spool_rows))
    assert len(set_aside) == len(set(set_aside))
    assert set(set_aside) <= store.rejected
    assert store.rejected.isdisjoint(store.rows)

    store.failure = None
    store.open.set()
    async with bench(directory, store) as again:
        await until(lambda: again.counts.spooled == 0)
    assert spooled(directory) == []
    assert set(store.rows) == set(made) - store.rejected
    assert set(again.set_aside()) == store.rejected
    assert it.counts.pending == 0
