"""What expiry does to a PostgreSQL database, in steps: who may delete, what is due, the deletion.

Who may is said by a row with an end, as in SQLite, and not by an advisory lock: those belong to a session,
and a pooler such as pgbouncer hands each transaction to another one. The server's autovacuum gives the space
back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import uuid4

from relay.records.deletion import Due
from relay.records.errors import ExpiryBusyError
from relay.records.postgres.database import GOODBYE_TIMEOUT_S, Connection, Database
from relay.records.postgres.follow import retention_state
from relay.records.steps import PLANNED_ROWS
from relay.records.store import LEASE, LEASE_RENEWAL_S, LONGEST_LEASE

__all__ = ["Behind", "Lease", "count_expired", "delete", "delete_doubts", "next_due", "oldest_expired"]

Behind = tuple[datetime, int]
"""A place in the order in which rows are deleted: when one was due, and its id."""


class Lease:
    """What lets one run, of all processes on the database, delete."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self.owner = uuid4().hex
        self._database = database
        self._clock = clock
        self._shown = time.monotonic()

    async def take(self) -> None:
        """Become the one; raises ExpiryBusyError while another is."""
        async with self._database.transaction() as connection:
            state = await retention_state(connection)
            if state is not None and state["done_to"] is not None:
                raise ExpiryBusyError(
                    "changed retention settings are being applied; expired rows are deleted after that"
                )
            now = self._clock()
            if (
                await connection.fetchval(_TAKE_LEASE, self.owner, now, now + LEASE, now + LONGEST_LEASE)
                is None
            ):
                raise ExpiryBusyError("another process is deleting expired rows just now")

    async def kept(self, *, in_doubt: bool = False) -> bool:
        """Show life, now and then or if `in_doubt`; False: we were silent for so long that another did."""
        if not in_doubt and time.monotonic() - self._shown < LEASE_RENEWAL_S:
            return True
        self._shown = time.monotonic()
        async with self._database.connection() as connection:
            return await connection.fetchval(_KEEP_LEASE, self.owner, self._clock() + LEASE) is not None

    async def drop(self) -> None:
        """Let others be the one at once."""
        async with self._database.connection() as connection:
            await connection.execute(_DROP_LEASE, self.owner, timeout=GOODBYE_TIMEOUT_S)


async def next_due(
    connection: Connection, moment: datetime, behind: Behind | None
) -> tuple[list[Due], Behind | None]:
    """Return the next rows to delete, those behind one that was looked up before, and the last one's place.

    Behind, and not simply the first: rows that another holds are left alone, and must not be found for ever.
    """
    rows = await connection.fetch(_DUE, moment, PLANNED_ROWS, *(behind or (None, None)))
    last = (rows[-1][2], rows[-1][0]) if rows else behind
    return [(key, work) for key, work, _ in rows], last


async def delete(connection: Connection, keys: Sequence[int], moment: datetime, owner: str) -> int:
    """Delete these rows, but for those that another holds, as long as the lease is ours; return how many."""
    return _count(await connection.execute(_DELETE, list(keys), moment, owner))


async def delete_doubts(connection: Connection, moment: datetime, rows: int, owner: str) -> int:
    """Delete expired entries of messages in doubt, at most `rows`; return how many there were."""
    return _count(await connection.execute(_DELETE_DOUBTS, moment, rows, owner))


async def count_expired(connection: Connection, moment: datetime) -> int:
    """Count what a run would delete."""
    return int(await connection.fetchval(_COUNT_EXPIRED, moment))


async def oldest_expired(connection: Connection, moment: datetime) -> datetime | None:
    """Return when the oldest row that has expired was due; None when there is none."""
    found: datetime | None = await connection.fetchval(_OLDEST_EXPIRED, moment)
    return found


def _count(status: str) -> int:
    """Return the rows of a command's status, such as `DELETE 5`."""
    return int(status.rpartition(" ")[2])


_COUNT_EXPIRED = """
    SELECT (SELECT count(*) FROM task_done WHERE expires_at <= $1)
        + (SELECT count(*) FROM task_in_doubt WHERE expires_at <= $1)
"""
# The last ordinal is found at once, a count would read them all.
_DUE = """
    SELECT id, 2 + coalesce((SELECT max(ordinal) FROM task_done_recipient WHERE task_done_id = id), -1),
        expires_at
    FROM task_done
    WHERE expires_at <= $1 AND expires_at >= coalesce($3, '-infinity'::timestamptz)
        AND ($3::timestamptz IS NULL OR (expires_at, id) > ($3, $4::bigint))
    ORDER BY expires_at, id LIMIT $2
"""
_OLDEST_EXPIRED = "SELECT expires_at FROM task_done WHERE expires_at <= $1 ORDER BY expires_at LIMIT 1"
_DELETE_DOUBTS = """
    DELETE FROM task_in_doubt WHERE id IN (
        SELECT id FROM task_in_doubt WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2
        FOR UPDATE SKIP LOCKED
    ) AND EXISTS (SELECT 1 FROM task_done_state WHERE name = 'expiry' AND value = $3)
"""
_DELETE = """
    DELETE FROM task_done WHERE id IN (
        SELECT id FROM task_done WHERE id = ANY($1::bigint[]) AND expires_at <= $2 FOR UPDATE SKIP LOCKED
    ) AND EXISTS (SELECT 1 FROM task_done_state WHERE name = 'expiry' AND value = $3)
"""
_TAKE_LEASE = """
    INSERT INTO task_done_state (name, value, expires_at) VALUES ('expiry', $1, $3)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at
    WHERE task_done_state.expires_at <= $2 OR task_done_state.expires_at > $4
    RETURNING 1
"""
_KEEP_LEASE = """
    UPDATE task_done_state SET expires_at = $2 WHERE name = 'expiry' AND value = $1 RETURNING 1
"""
_DROP_LEASE = "DELETE FROM task_done_state WHERE name = 'expiry' AND value = $1"
