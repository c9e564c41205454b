"""The store in a PostgreSQL database: a pool of connections, each statement of ours on one for a moment.

Statements are plain SQL: a layer that builds them would cost a message more than the insert does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial

from relay.records.deletion import Due, delete_expired
from relay.records.model import Entry
from relay.records.pacing import Commits
from relay.records.postgres.database import GOODBYE_TIMEOUT_S, Connection, Database
from relay.records.postgres.expire import (
    Behind,
    Lease,
    count_expired,
    delete,
    delete_doubts,
    next_due,
    oldest_expired,
)
from relay.records.postgres.follow import begin_following, count_due, follow
from relay.records.postgres.insert import insert_entries
from relay.records.retention import Retention

__all__ = ["PostgresStore"]


class PostgresStore:
    """A PostgreSQL database; see `relay.records.store.Store` for what its methods promise."""

    def __init__(
        self, database: Database, retention: Retention, relay: str, clock: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._retention = retention
        self._relay = relay
        self._clock = clock
        self._commits = Commits()

    @classmethod
    async def open(
        cls,
        url: str,
        retention: Retention,
        *,
        create: bool,
        upgrade: bool,
        later: bool,
        relay: str,
        clock: Callable[[], datetime],
    ) -> PostgresStore:
        """Open the database that `url` names; see `relay.records.store.open_store`."""
        database = await Database.open(url, create=create, upgrade=upgrade, later=later)
        return cls(database, retention, relay, clock)

    async def write(self, entries: Sequence[Entry]) -> None:
        """Commit the entries with one statement."""
        if not entries:
            return
        async with self._database.connection() as connection:
            begun = time.monotonic()
            await insert_entries(connection, entries, self._retention, self._relay)
            seconds = time.monotonic() - begun
        self._commits.took(seconds)

    def use_retention(self, retention: Retention) -> None:
        """Give new rows the ends of this retention."""
        self._retention = retention

    async def count(self) -> int:
        """Return how many rows there are."""
        async with self._database.connection() as connection:
            return int(await connection.fetchval("SELECT count(*) FROM task_done"))

    async def close(self) -> None:
        """Finish what was asked for, then close."""
        await self._database.close()

    # Presence

    async def say_alive(self, name: str, until: datetime) -> None:
        """Renew the row that says so, and clear away those that were not renewed."""
        async with self._database.transaction() as connection:
            await connection.execute(_CLEAR, "relay:%", self._clock())
            await connection.execute(_ALIVE, name, until, "")

    async def say_gone(self, name: str) -> None:
        """Delete the row."""
        async with self._database.connection() as connection:
            await connection.execute(
                "DELETE FROM task_done_state WHERE name = $1", name, timeout=GOODBYE_TIMEOUT_S
            )

    # Retention

    async def say_retention(self, name: str, value: str, until: datetime) -> dict[str, str]:
        """Renew the row that says so, and read those of the others."""
        async with self._database.transaction() as connection:
            await connection.execute(_CLEAR, "retention:%", self._clock())
            await connection.execute(_ALIVE, name, until, value)
            return dict(await connection.fetch(_OTHERS, name))

    async def follow_retention(
        self, *, again: bool = False, on_due: Callable[[int], None] | None = None
    ) -> int:
        """Make existing rows follow, step by step."""
        retention = self._retention  # another one may come in the midst; its own run then takes over
        target = retention.canonical()
        async with self._database.transaction() as connection:
            if not await begin_following(connection, target, again=again):
                return 0
        async with self._database.connection() as connection:
            due = await count_due(connection, retention, self._clock())
        if due and on_due is not None:
            on_due(due)
        changed = 0
        while True:
            async with self._database.transaction() as connection:
                step = await follow(connection, retention, target)
            changed += step.rows
            if step.finished:
                return changed
            await asyncio.sleep(step.seconds)

    # Expiry

    async def expire(
        self,
        now: datetime,
        batch_size: int,
        *,
        dry_run: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> int:
        """Delete what has expired, step by step; the server's autovacuum gives the space back."""
        if dry_run:
            async with self._database.connection() as connection:
                return await count_expired(connection, now)
        lease = Lease(self._database, self._clock)
        await lease.take()
        try:
            expired = _Expired(self._database, now, lease.owner)
            return await delete_expired(expired, lease, self._commits, batch_size, on_batch)
        finally:
            await lease.drop()

    async def expiry_lag(self, now: datetime) -> float:
        """Return for how long the oldest row that has expired is due."""
        async with self._database.connection() as connection:
            oldest = await oldest_expired(connection, now)
        return 0.0 if oldest is None else (now - oldest).total_seconds()


class _Expired:
    """What has expired in the database by `moment`, for the run that has the lease as `owner`."""

    def __init__(self, database: Database, moment: datetime, owner: str) -> None:
        self._database = database
        self._moment = moment
        self._owner = owner
        self._last: Behind | None = None

    async def next_due(self) -> list[Due]:
        """Look up those behind the last that was looked up."""
        async with self._database.connection() as connection:
            due, self._last = await next_due(connection, self._moment, self._last)
        return due

    async def delete(self, keys: Sequence[int]) -> tuple[int, float]:
        """Delete these rows."""
        return await self._timed(partial(delete, keys=keys, moment=self._moment, owner=self._owner))

    async def delete_doubts(self, rows: int) -> tuple[int, float]:
        """Delete messages in doubt."""
        return await self._timed(partial(delete_doubts, moment=self._moment, rows=rows, owner=self._owner))

    async def _timed(self, work: Callable[[Connection], Awaitable[int]]) -> tuple[int, float]:
        """Run `work`, one statement; return the rows it is about, and the seconds it took."""
        async with self._database.connection() as connection:
            begun = time.monotonic()
            rows = await work(connection)
            return rows, time.monotonic() - begun


_CLEAR = """
    DELETE FROM task_done_state WHERE name IN (
        SELECT name FROM task_done_state
        WHERE name LIKE $1 AND expires_at <= $2 FOR UPDATE SKIP LOCKED
    )
"""
_ALIVE = """
    INSERT INTO task_done_state (name, value, expires_at) VALUES ($1, $3, $2)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at
"""
_OTHERS = "SELECT name, value FROM task_done_state WHERE name LIKE 'retention:%' AND name <> $1"
