"""The store on a SQLite file: one writer connection, on which all that changes the file takes its turn.

Statements are plain SQL: a layer that builds them would cost a message more than the insert does.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from relay.records.deletion import Due, delete_expired
from relay.records.model import Entry
from relay.records.pacing import Commits, Pace
from relay.records.retention import Retention
from relay.records.sqlite.database import Database
from relay.records.sqlite.expire import (
    Lease,
    count_expired,
    delete,
    delete_doubts,
    next_due,
    oldest_expired,
    vacuum,
)
from relay.records.sqlite.file import path_of
from relay.records.sqlite.follow import begin_following, count_due, follow
from relay.records.sqlite.insert import insert_entries, prepare
from relay.records.sqlite.presence import say_alive, say_gone, say_retention
from relay.records.steps import Step
from relay.records.tables import utc_text

__all__ = ["SqliteStore"]

T = TypeVar("T")


class SqliteStore:
    """An open SQLite file; see `relay.records.store.Store` for what its methods promise."""

    def __init__(
        self, database: Database, retention: Retention, relay: str, clock: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._retention = retention
        self._relay = relay
        self._clock = clock
        self._commits = Commits()  # by the connection's thread

    @classmethod
    async def open(
        cls,
        url: str,
        retention: Retention,
        *,
        create: bool,
        upgrade: bool,
        busy_timeout: float,
        relay: str,
        clock: Callable[[], datetime],
    ) -> SqliteStore:
        """Open the file that `url` names; see `relay.records.store.open_store`."""
        database = await Database.open(
            path_of(url), create=create, busy_timeout=busy_timeout, upgrade=upgrade
        )
        try:
            await database.run(prepare)
        except BaseException:
            await database.close()
            raise
        return cls(database, retention, relay, clock)

    def write(self, entries: Sequence[Entry]) -> asyncio.Future[None]:
        """Commit the entries with one statement."""
        return self._database.statement(partial(self._insert, entries))

    def _insert(self, entries: Sequence[Entry], raw: sqlite3.Connection) -> None:
        if entries:
            begun = time.monotonic()
            insert_entries(raw, entries, self._retention, self._relay)
            self._commits.took(time.monotonic() - begun)

    def use_retention(self, retention: Retention) -> None:
        """Give new rows the ends of this retention."""
        self._retention = retention

    async def count(self) -> int:
        """Return how many rows there are."""
        return await self._database.run(
            lambda raw: int(raw.execute("SELECT count(*) FROM task_done").fetchone()[0])
        )

    async def close(self) -> None:
        """Finish what was asked for, then close."""
        await self._database.close()

    # Presence

    async def say_alive(self, name: str, until: datetime) -> None:
        """Renew the row that says so."""
        await self._database.transaction(lambda raw: say_alive(raw, name, self._clock(), until))

    async def say_gone(self, name: str) -> None:
        """Delete the row."""
        await self._database.transaction(lambda raw: say_gone(raw, name))

    # Retention

    async def say_retention(self, name: str, value: str, until: datetime) -> dict[str, str]:
        """Renew the row that says so, and read those of the others."""
        return await self._database.transaction(
            lambda raw: say_retention(raw, name, value, self._clock(), until)
        )

    async def follow_retention(
        self, *, again: bool = False, on_due: Callable[[int], None] | None = None
    ) -> int:
        """Make existing rows follow, step by step."""
        retention = self._retention  # another one may come in the midst; its own run then takes over
        target = retention.canonical()
        if not await self._database.transaction(lambda raw: begin_following(raw, target, again=again)):
            return 0
        due = await self._database.read(lambda raw: count_due(raw, retention, self._clock()))
        if due and on_due is not None:
            on_due(due)
        changed = 0
        finished = False
        while not finished:
            step = await self._paced(lambda raw: follow(raw, retention, target))
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
        """Delete what has expired, step by step, then give pages back to the file system."""
        moment = utc_text(now)
        if dry_run:
            return await self._database.read(lambda raw: count_expired(raw, moment))
        lease = Lease(self._database, self._clock)
        await lease.take()
        try:
            expired = _Expired(self._database, moment, lease.owner)
            deleted = await delete_expired(expired, lease, self._commits, batch_size, on_batch)
            await self._give_space_back(lease)
        finally:
            await lease.drop()
        return deleted

    async def expiry_lag(self, now: datetime) -> float:
        """Return for how long, in seconds, the oldest row that has expired is due; 0.0 when there is none."""
        moment = utc_text(now)
        oldest = await self._database.run(lambda raw: oldest_expired(raw, moment))
        if oldest is None:
            return 0.0
        return (now - datetime.fromisoformat(oldest).replace(tzinfo=UTC)).total_seconds()

    async def _give_space_back(self, lease: Lease) -> None:
        pace = Pace()
        more = True
        while more and await lease.kept():
            more, seconds = await _timed(self._database, lambda raw: vacuum(raw, pace.work))
            await self._commits.rest(pace, seconds)
        # PASSIVE waits for nobody; the file shrinks when the log has been carried into it.
        await self._database.run(lambda raw: raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())

    async def _paced(self, work: Callable[[sqlite3.Connection], Step]) -> Step:
        """Run one short transaction, then leave the store to others for as long as it took."""
        step = await self._database.transaction(work)
        if not step.finished:
            await asyncio.sleep(step.seconds)
        return step


class _Expired:
    """What has expired in the file by `moment`, for the run that has the lease as `owner`."""

    def __init__(self, database: Database, moment: str, owner: str) -> None:
        self._database = database
        self._moment = moment
        self._owner = owner

    async def next_due(self) -> list[Due]:
        """Look them up: what was deleted is not found again."""
        return await self._database.run(lambda raw: next_due(raw, self._moment))

    async def delete(self, keys: Sequence[int]) -> tuple[int, float]:
        """Delete these rows."""
        work = partial(delete, keys=keys, moment=self._moment, owner=self._owner)
        return await _timed(self._database, work)

    async def delete_doubts(self, rows: int) -> tuple[int, float]:
        """Delete messages in doubt."""
        work = partial(delete_doubts, moment=self._moment, rows=rows, owner=self._owner)
        return await _timed(self._database, work)


async def _timed(database: Database, work: Callable[[sqlite3.Connection], T]) -> tuple[T, float]:
    """Run `work`, which writes with one statement; return the seconds it took, too."""

    def timed(raw: sqlite3.Connection) -> tuple[T, float]:
        begun = time.monotonic()
        return work(raw), time.monotonic() - begun

    return await database.statement(timed)
