"""The store: rows go in durably, follow the retention settings, and go away when they have expired.

Rules. A write is one transaction, and done when it is on the disk. Long work (retention, expiry) is cut
into short transactions with pauses between them, so that writes, here and in other processes on the same
database, come in between. Statements are plain SQL, and but for the insert in words that SQLite and
PostgreSQL share: a layer that builds them would cost a message more than the insert does.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import orjson

from relay.envelope import domain_of
from relay.records.errors import ExpiryBusyError, RejectedRecordError, StoreError
from relay.records.model import Doubt, Entry, Record
from relay.records.pacing import Pace
from relay.records.retention import Retention
from relay.records.schema import utc_text
from relay.records.sqlite import Database, path_of

__all__ = ["ExpiryBusyError", "RejectedRecordError", "Store", "StoreError", "utc_now"]

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
RETENTION_ROWS = 500
PLANNED_ROWS = 250
"""Expired rows that are looked up at a time, to be deleted in as many steps as it takes."""
LEASE = timedelta(seconds=60)
"""How long a run of expiry that shows no life keeps others away."""
LEASE_RENEWAL_S = 5.0


def utc_now() -> datetime:
    """Return the time of day, aware, UTC."""
    return datetime.now(UTC)


class Store:
    """The open store. Its methods may be called at the same time, from one event loop."""

    def __init__(self, database: Database, retention: Retention, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._retention = retention
        self._clock = clock
        self._commits = 0  # since long work last looked
        self._commit_s = 0.0  # what one takes, smoothed

    @classmethod
    async def open(
        cls,
        url: str,
        retention: Retention,
        *,
        create: bool = True,
        busy_timeout: float = BUSY_TIMEOUT_S,
        clock: Callable[[], datetime] = utc_now,
    ) -> Store:
        """Open the store at `url` and bring its schema to this version.

        A file that does not exist is made, with its directory, when `create`. `busy_timeout`, in seconds, is
        how long another process's lock is waited for; `clock` gives the time, aware, for leases and for
        what is due. Raises StoreError, in one line that names the file and what to change.
        """
        database = await Database.open(path_of(url), create=create, busy_timeout=busy_timeout)
        try:
            await database.run(_prepare)
        except BaseException:
            await database.close()
            raise
        return cls(database, retention, clock)

    async def write(self, entries: Sequence[Entry]) -> None:
        """Make the entries durable, all or none; one that is there already (by `task_id`) stays as it is.

        A record ends the doubt of its message if it says that there may be one (`doubted`); a doubt of a
        message that has its row, or that is settled in the same batch, is none. What is written again,
        in the order in which it was given, comes to the same.

        Raises RejectedRecordError if one of them can never be taken, StoreError if the store cannot be
        written now. A caller that is cancelled does not know: the transaction is finished all the same.
        """
        if entries:
            _, seconds = await self._timed(lambda raw: _insert(raw, entries, self._retention))
            self._commits += 1
            self._commit_s += (seconds - self._commit_s) / 16

    def use_retention(self, retention: Retention) -> None:
        """Give new rows the ends of this retention; `follow_retention` does so for those that exist."""
        self._retention = retention

    async def count(self) -> int:
        """Return how many rows there are."""
        return await self._database.run(lambda raw: _integer(raw.execute(_COUNT)))

    async def close(self) -> None:
        """Finish what was asked for, then close. Afterwards every method raises StoreError."""
        await self._database.close()

    # Retention

    async def follow_retention(self, *, on_due: Callable[[int], None] | None = None) -> int:
        """Make the rows that exist follow the retention settings; return how many changed.

        Nothing happens unless the settings differ from those that the rows follow. Before the first row
        changes, `on_due` is told how many rows will become due by it, if any. Call it before expiry: a run
        that was cut short is taken up again by the next call, and expiry waits until then.
        """
        retention = self._retention  # another one may come in the midst; its own run then takes over
        target = retention.canonical()
        if not await self._database.transaction(lambda raw: _begin_following(raw, target)):
            return 0
        due = await self._database.read(lambda raw: _count_due(raw, retention, self._clock()))
        if due and on_due is not None:
            on_due(due)
        changed = 0
        finished = False
        while not finished:
            step = await self._paced(lambda raw: _follow(raw, retention, target))
            changed += step.rows
            finished = step.finished
        return changed

    # Expiry

    async def expire(
        self,
        now: datetime,
        batch_size: int,
        *,
        dry_run: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> int:
        """Delete every row whose `expires_at` is not after `now`, and give the space back; return how many.

        No transaction deletes more than `batch_size` rows; each is about as long as a commit of new rows (a
        row goes with all its recipients, so one with a thousand takes longer). `on_batch` is told of each
        one's rows. With `dry_run` they are only counted. Raises ExpiryBusyError while another run, here or in
        another process, is at work.
        """
        moment = utc_text(now)
        if dry_run:
            return await self._database.read(
                lambda raw: _integer(raw.execute(_COUNT_EXPIRED, {"now": moment}))
            )
        lease = _Lease(self._database, self._clock)
        await lease.take()
        try:
            deleted = await self._delete_expired(moment, batch_size, lease, on_batch)
            await self._give_space_back(lease)
        finally:
            await lease.drop()
        return deleted

    async def expiry_lag(self, now: datetime) -> float:
        """Return for how long, in seconds, the oldest row that has expired is due; 0.0 when there is none."""
        moment = utc_text(now)
        row = await self._database.run(lambda raw: raw.execute(_OLDEST_EXPIRED, {"now": moment}).fetchone())
        if row[0] is None:
            return 0.0
        return (now - datetime.fromisoformat(row[0]).replace(tzinfo=UTC)).total_seconds()

    async def _delete_expired(
        self, moment: str, batch_size: int, lease: _Lease, on_batch: Callable[[int], None] | None
    ) -> int:
        pace = Pace()
        deleted = 0
        due: list[tuple[int, int]] = []
        while True:
            if not due:
                due = await self._database.run(lambda raw: _due(raw, moment))
                if not due:
                    return deleted + await self._delete_doubts(moment, batch_size, lease, on_batch)
            count = min(batch_size, pace.first([work for _, work in due]))
            keys = [key for key, _ in due[:count]]
            due = due[count:]
            rows, seconds = await self._timed(partial(_delete, keys=keys, moment=moment, owner=lease.owner))
            deleted += rows
            if rows and on_batch is not None:
                on_batch(rows)
            if not await lease.kept(in_doubt=rows < len(keys)):
                return deleted  # the rest is the work of the one who has it
            await self._rest(pace, seconds)

    async def _delete_doubts(
        self, moment: str, batch_size: int, lease: _Lease, on_batch: Callable[[int], None] | None
    ) -> int:
        """Delete what has expired of the messages in doubt; they are few."""
        pace = Pace()
        deleted = 0
        while True:
            wanted = min(batch_size, pace.work)
            work = partial(_delete_doubts, moment=moment, rows=wanted, owner=lease.owner)
            rows, seconds = await self._timed(work)
            deleted += rows
            if rows and on_batch is not None:
                on_batch(rows)
            if rows < wanted or not await lease.kept():
                return deleted
            await self._rest(pace, seconds)

    async def _give_space_back(self, lease: _Lease) -> None:
        pace = Pace()
        more = True
        while more and await lease.kept():
            more, seconds = await self._timed(lambda raw: _vacuum(raw, pace.work))
            await self._rest(pace, seconds)
        # PASSIVE waits for nobody; the file shrinks when the log has been carried into it.
        await self._database.run(lambda raw: raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())

    async def _timed(self, work: Callable[[sqlite3.Connection], T]) -> tuple[T, float]:
        """Run `work`, which writes with one statement; return the seconds it took, too."""

        def timed(raw: sqlite3.Connection) -> tuple[T, float]:
            begun = time.monotonic()
            return work(raw), time.monotonic() - begun

        return await self._database.statement(timed)

    async def _rest(self, pace: Pace, seconds: float) -> None:
        commits, self._commits = self._commits, 0
        await asyncio.sleep(pace.took(seconds, commit=self._commit_s, commits=commits > 0))

    async def _paced(self, work: Callable[[sqlite3.Connection], _Step]) -> _Step:
        """Run one short transaction, then leave the store to others for as long as it took."""
        step = await self._database.transaction(work)
        if not step.finished:
            await asyncio.sleep(step.seconds)
        return step


@dataclass(frozen=True, slots=True)
class _Step:
    """What one short transaction of long work did."""

    rows: int
    seconds: float
    finished: bool


def _prepare(raw: sqlite3.Connection) -> None:
    """Make what takes a batch apart; temporary, so it belongs to this connection and not to the file."""
    for statement in (_BATCH_VIEW, _BATCH_TRIGGER, _MIXED_VIEW, _MIXED_TRIGGER):
        raw.execute(statement)


def _insert(raw: sqlite3.Connection, entries: Sequence[Entry], retention: Retention) -> None:
    """Insert the entries with one statement, however many they are: a transaction of its own.

    The whole batch goes to SQLite as JSON, and a trigger of this connection takes it apart. Each statement,
    BEGIN and COMMIT among them, lets go of the interpreter lock and asks for it again, `executemany` for
    every row; that costs up to 5 ms each time when the event loop is busy, which is when batches are big.
    Measured for 500 rows beside a loop that never rests: `executemany` 0.8 s, two statements 0.07 s; in the
    whole relay under load one statement takes 5 % less CPU for a message than BEGIN, two and COMMIT.

    A batch of records alone, none of them doubted, is by far the most frequent one: it does not look at
    `task_in_doubt`.
    """
    rows = []
    recipients = []
    doubts = []
    ended = []
    try:
        for record in entries:
            if type(record) is not Record:
                if isinstance(record, Doubt):
                    doubts.append(_doubt_row(record, retention))
                else:
                    ended.append(record.task_id)
                continue
            if record.doubted:
                ended.append(record.task_id)
            sent_at = utc_text(record.sent_at)
            expires_at = retention.expires_at(record.task_type, record.sent_at)
            rows.append(
                (
                    record.task_id,
                    record.client_task_id,
                    record.task_type,
                    record.sender,
                    domain_of(record.sender),
                    record.client,
                    sent_at,
                    None if expires_at is None else utc_text(expires_at),
                    record.upstream,
                    record.upstream_reply,
                    record.message_id,
                    record.size,
                    record.duration_ms,
                    record.data,
                )
            )
            for ordinal, recipient in enumerate(record.recipients):
                recipients.append((record.task_id, ordinal, recipient, domain_of(recipient), sent_at))
        batch = orjson.dumps(rows).decode(), orjson.dumps(recipients).decode()
        doubtful = (orjson.dumps(doubts).decode(), orjson.dumps(ended).decode()) if doubts or ended else None
    except (TypeError, ValueError) as error:  # no time zone, a lone surrogate, an integer beyond 64 bits
        raise RejectedRecordError(f"a value that cannot be stored: {error}") from error
    if doubtful is None:
        raw.execute("INSERT INTO task_done_batch (sends, recipients) VALUES (?, ?)", batch)
    else:
        raw.execute(
            "INSERT INTO task_done_mixed (sends, recipients, doubts, ended) VALUES (?, ?, ?, ?)",
            batch + doubtful,
        )


def _doubt_row(doubt: Doubt, retention: Retention) -> tuple[object, ...]:
    expires_at = retention.expires_at(doubt.task_type, doubt.since)
    return (
        doubt.task_id,
        doubt.client_task_id,
        doubt.task_type,
        doubt.sender,
        domain_of(doubt.sender),
        doubt.client,
        utc_text(doubt.since),
        None if expires_at is None else utc_text(expires_at),
        doubt.upstream,
        doubt.reason,
        doubt.message_id,
        doubt.size,
        doubt.duration_ms,
        doubt.recipients,
        doubt.data,
    )


def _integer(cursor: sqlite3.Cursor) -> int:
    return int(cursor.fetchone()[0])


# Retention, within one transaction each. The row `retention` of `task_done_state` says which settings the
# rows follow, or are being made to follow, and (`done_to`; `doubts_to` for the messages in doubt) up to which
# id; null: all of them. Two processes with the same settings share the work; of two with different ones the
# later takes over and the other ends.


def _begin_following(raw: sqlite3.Connection, target: str) -> bool:
    """Say that the rows are to follow `target`; return whether there is anything to do."""
    state = _retention_state(raw)
    if state is not None and state["policy"] == target:
        return state["done_to"] is not None
    _keep_retention_state(raw, target, 0, doubts_to=0)
    return True


def _follow(raw: sqlite3.Connection, retention: Retention, target: str) -> _Step:
    """Make the next rows follow."""
    begun = time.monotonic()
    state = _retention_state(raw)
    if state is None or state["policy"] != target or state["done_to"] is None:
        return _Step(0, 0.0, finished=True)
    doubts_to = state.get("doubts_to")  # the doubts first, so that `done_to` alone says when all is done
    if doubts_to is not None:
        rows, changes = _following(raw, retention, _NEXT_DOUBTS, doubts_to)
        raw.executemany(_SET_DOUBT_EXPIRY, changes)
        doubts_to = None if len(rows) < RETENTION_ROWS else rows[-1][0]
        _keep_retention_state(raw, target, state["done_to"], doubts_to=doubts_to)
        return _Step(len(changes), time.monotonic() - begun, finished=False)
    rows, changes = _following(raw, retention, _NEXT_ROWS, state["done_to"])
    raw.executemany(_SET_EXPIRY, changes)
    finished = len(rows) < RETENTION_ROWS
    _keep_retention_state(raw, target, None if finished else rows[-1][0])
    return _Step(len(changes), time.monotonic() - begun, finished)


def _following(
    raw: sqlite3.Connection, retention: Retention, query: str, done_to: int
) -> tuple[list[Any], list[dict[str, object]]]:
    """Return the next rows, and what is to change in them."""
    rows = raw.execute(query, {"done_to": done_to, "rows": RETENTION_ROWS}).fetchall()
    changes: list[dict[str, object]] = []
    for key, task_type, sent_at, expires_at in rows:
        end = retention.expires_at(task_type, datetime.fromisoformat(sent_at).replace(tzinfo=UTC))
        wanted = None if end is None else utc_text(end)
        if wanted != expires_at:
            changes.append({"id": key, "expires_at": wanted})
    return rows, changes


def _count_due(raw: sqlite3.Connection, retention: Retention, now: datetime) -> int:
    """Count the rows that are not due by what they say, and would be by `retention`."""
    named = tuple(retention.by_type)
    kinds: list[tuple[str, tuple[str, ...], timedelta | None]] = [
        ("= :t0", (name,), period) for name, period in retention.by_type.items()
    ]
    others = ", ".join(f":t{index}" for index in range(len(named)))
    kinds.append((f"NOT IN ({others})", named, retention.default))
    due = 0
    for condition, names, period in kinds:
        if period is None:
            continue
        try:
            sent_before = now - period
        except OverflowError:
            continue
        parameters = {f"t{index}": name for index, name in enumerate(names)}
        parameters |= {"sent_before": utc_text(sent_before), "now": utc_text(now)}
        for query in (_COUNT_DUE, _COUNT_DUE_DOUBTS):
            due += _integer(raw.execute(query + condition, parameters))
    return due


def _retention_state(raw: sqlite3.Connection) -> dict[str, Any] | None:
    row = raw.execute(_GET_RETENTION).fetchone()
    if row is None:
        return None
    state: dict[str, Any] = orjson.loads(row[0])
    return state


def _keep_retention_state(
    raw: sqlite3.Connection, policy: str, done_to: int | None, *, doubts_to: int | None = None
) -> None:
    value = orjson.dumps({"policy": policy, "done_to": done_to, "doubts_to": doubts_to}).decode()
    raw.execute(_PUT_RETENTION, {"value": value})


# Expiry.


class _Lease:
    """What lets one run, of all processes on the database, delete and give space back."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self.owner = uuid4().hex
        self._database = database
        self._clock = clock
        self._shown = time.monotonic()

    async def take(self) -> None:
        """Become the one; raises ExpiryBusyError while another is."""
        await self._database.transaction(lambda raw: _take_lease(raw, self.owner, self._clock()))

    async def kept(self, *, in_doubt: bool = False) -> bool:
        """Show life, now and then or if `in_doubt`; False: we were silent for so long that another did."""
        if not in_doubt and time.monotonic() - self._shown < LEASE_RENEWAL_S:
            return True
        self._shown = time.monotonic()
        return await self._database.transaction(lambda raw: _keep_lease(raw, self.owner, self._clock()))

    async def drop(self) -> None:
        """Let others be the one at once."""
        await self._database.transaction(lambda raw: raw.execute(_DROP_LEASE, {"owner": self.owner}))


def _take_lease(raw: sqlite3.Connection, owner: str, now: datetime) -> None:
    """Become the one that deletes, unless another is."""
    state = _retention_state(raw)
    if state is not None and state["done_to"] is not None:
        raise ExpiryBusyError(
            "changed retention settings are being applied; expired rows are deleted after that"
        )
    lease = {"owner": owner, "now": utc_text(now), "until": utc_text(now + LEASE)}
    if raw.execute(_TAKE_LEASE, lease).rowcount == 0:
        raise ExpiryBusyError("another process is deleting expired rows just now")


def _keep_lease(raw: sqlite3.Connection, owner: str, now: datetime) -> bool:
    """Show life; return whether the lease is still ours."""
    return raw.execute(_KEEP_LEASE, {"owner": owner, "until": utc_text(now + LEASE)}).rowcount > 0


def _due(raw: sqlite3.Connection, moment: str) -> list[tuple[int, int]]:
    """Return the next rows to delete, each with the rows of all tables that go with it."""
    return raw.execute(_DUE, {"now": moment, "rows": PLANNED_ROWS}).fetchall()


def _delete(raw: sqlite3.Connection, keys: Sequence[int], moment: str, owner: str) -> int:
    """Delete these rows, as long as the lease is ours; return how many there were.

    One statement, a transaction of its own: see `_insert` for why.
    """
    parameters = {"keys": orjson.dumps(keys).decode(), "now": moment, "owner": owner}
    return raw.execute(_DELETE, parameters).rowcount


def _delete_doubts(raw: sqlite3.Connection, moment: str, rows: int, owner: str) -> int:
    """Delete expired entries of messages in doubt, at most `rows`; return how many there were."""
    return raw.execute(_DELETE_DOUBTS, {"now": moment, "rows": rows, "owner": owner}).rowcount


def _vacuum(raw: sqlite3.Connection, pages: int) -> bool:
    """Give some free pages back; return whether there may be more."""
    before = _integer(raw.execute("PRAGMA freelist_count"))
    if not before:
        return False
    # Each row fetched is one page given back.
    raw.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    return 0 < _integer(raw.execute("PRAGMA freelist_count")) < before


_INSERT = """
    INSERT INTO task_done (
        task_id, client_task_id, task_type, sender, sender_domain, client, sent_at, expires_at,
        upstream, upstream_reply, message_id, size, duration_ms, data
    )
    SELECT
        json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
        json_extract(value, '$[6]'), json_extract(value, '$[7]'), json_extract(value, '$[8]'),
        json_extract(value, '$[9]'), json_extract(value, '$[10]'), json_extract(value, '$[11]'),
        json_extract(value, '$[12]'), json_extract(value, '$[13]')
    FROM json_each(NEW.sends) WHERE true
    ON CONFLICT (task_id) DO NOTHING
"""
# Through the row's task_id: its id is not known here, and the row may have been there before.
# CROSS JOIN: SQLite's way to say that the batch is the outer loop.
_INSERT_RECIPIENTS = """
    INSERT INTO task_done_recipient (task_done_id, ordinal, recipient, recipient_domain, sent_at)
    SELECT
        task_done.id, json_extract(batch.value, '$[1]'), json_extract(batch.value, '$[2]'),
        json_extract(batch.value, '$[3]'), json_extract(batch.value, '$[4]')
    FROM json_each(NEW.recipients) AS batch
    CROSS JOIN task_done ON task_done.task_id = json_extract(batch.value, '$[0]')
    WHERE true
    ON CONFLICT (task_done_id, ordinal) DO NOTHING
"""
_BATCH_VIEW = "CREATE TEMP VIEW task_done_batch AS SELECT NULL AS sends, NULL AS recipients"
_BATCH_TRIGGER = f"""
    CREATE TEMP TRIGGER task_done_batch_insert INSTEAD OF INSERT ON task_done_batch
    BEGIN {_INSERT}; {_INSERT_RECIPIENTS}; END
"""
# What ends a doubt comes last, so the order within a batch does not matter: nobody doubts a message again.
_INSERT_DOUBTS = """
    INSERT INTO task_in_doubt (
        task_id, client_task_id, task_type, sender, sender_domain, client, since, expires_at,
        upstream, reason, message_id, size, duration_ms, recipients, data
    )
    SELECT
        json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
        json_extract(value, '$[6]'), json_extract(value, '$[7]'), json_extract(value, '$[8]'),
        json_extract(value, '$[9]'), json_extract(value, '$[10]'), json_extract(value, '$[11]'),
        json_extract(value, '$[12]'), json_extract(value, '$[13]'), json_extract(value, '$[14]')
    FROM json_each(NEW.doubts)
    WHERE NOT EXISTS (SELECT 1 FROM task_done WHERE task_done.task_id = json_extract(value, '$[0]'))
    ON CONFLICT (task_id) DO NOTHING
"""
_END_DOUBTS = "DELETE FROM task_in_doubt WHERE task_id IN (SELECT value FROM json_each(NEW.ended))"
_MIXED_VIEW = """
    CREATE TEMP VIEW task_done_mixed
    AS SELECT NULL AS sends, NULL AS recipients, NULL AS doubts, NULL AS ended
"""
_MIXED_TRIGGER = f"""
    CREATE TEMP TRIGGER task_done_mixed_insert INSTEAD OF INSERT ON task_done_mixed
    BEGIN {_INSERT}; {_INSERT_RECIPIENTS}; {_INSERT_DOUBTS}; {_END_DOUBTS}; END
"""
_COUNT = "SELECT count(*) FROM task_done"
_COUNT_DUE = """
    SELECT count(*) FROM task_done
    WHERE sent_at <= :sent_before AND (expires_at IS NULL OR expires_at > :now) AND task_type
"""
_NEXT_ROWS = """
    SELECT id, task_type, sent_at, expires_at FROM task_done WHERE id > :done_to ORDER BY id LIMIT :rows
"""
_COUNT_DUE_DOUBTS = """
    SELECT count(*) FROM task_in_doubt
    WHERE since <= :sent_before AND (expires_at IS NULL OR expires_at > :now) AND task_type
"""
_NEXT_DOUBTS = """
    SELECT id, task_type, since, expires_at FROM task_in_doubt WHERE id > :done_to ORDER BY id LIMIT :rows
"""
_SET_DOUBT_EXPIRY = "UPDATE task_in_doubt SET expires_at = :expires_at WHERE id = :id"
_SET_EXPIRY = "UPDATE task_done SET expires_at = :expires_at WHERE id = :id"
_COUNT_EXPIRED = """
    SELECT (SELECT count(*) FROM task_done WHERE expires_at <= :now)
        + (SELECT count(*) FROM task_in_doubt WHERE expires_at <= :now)
"""
# The last ordinal is found at once, a count would read them all.
_DUE = """
    SELECT id, 2 + coalesce((SELECT max(ordinal) FROM task_done_recipient WHERE task_done_id = id), -1)
    FROM task_done WHERE expires_at <= :now ORDER BY expires_at LIMIT :rows
"""
_OLDEST_EXPIRED = "SELECT min(expires_at) FROM task_done WHERE expires_at <= :now"
_DELETE_DOUBTS = """
    DELETE FROM task_in_doubt WHERE id IN (
        SELECT id FROM task_in_doubt WHERE expires_at <= :now ORDER BY expires_at LIMIT :rows
    ) AND EXISTS (SELECT 1 FROM task_done_state WHERE name = 'expiry' AND value = :owner)
"""
_DELETE = """
    DELETE FROM task_done
    WHERE id IN (SELECT value FROM json_each(:keys)) AND expires_at <= :now
    AND EXISTS (SELECT 1 FROM task_done_state WHERE name = 'expiry' AND value = :owner)
"""
_GET_RETENTION = "SELECT value FROM task_done_state WHERE name = 'retention'"
_PUT_RETENTION = """
    INSERT INTO task_done_state (name, value) VALUES ('retention', :value)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
_TAKE_LEASE = """
    INSERT INTO task_done_state (name, value, expires_at) VALUES ('expiry', :owner, :until)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at
    WHERE task_done_state.expires_at <= :now
"""
_KEEP_LEASE = "UPDATE task_done_state SET expires_at = :until WHERE name = 'expiry' AND value = :owner"
_DROP_LEASE = "DELETE FROM task_done_state WHERE name = 'expiry' AND value = :owner"
