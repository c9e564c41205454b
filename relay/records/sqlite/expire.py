"""What expiry does to a SQLite file, in steps: who may delete, what is due, the deletion, the space."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import uuid4

import orjson

from relay.records.deletion import Due
from relay.records.errors import ExpiryBusyError
from relay.records.sqlite.database import Database
from relay.records.sqlite.follow import retention_state
from relay.records.steps import PLANNED_ROWS
from relay.records.store import LEASE, LEASE_RENEWAL_S, LONGEST_LEASE
from relay.records.tables import utc_text

__all__ = ["Lease", "count_expired", "delete", "delete_doubts", "next_due", "oldest_expired", "vacuum"]


class Lease:
    """What lets one run, of all processes on the database, delete and give space back."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self.owner = uuid4().hex
        self._database = database
        self._clock = clock
        self._shown = time.monotonic()

    async def take(self) -> None:
        """Become the one; raises ExpiryBusyError while another is."""
        try:
            await self._database.transaction(lambda raw: _take_lease(raw, self.owner, self._clock()))
        except asyncio.CancelledError:
            await self.drop()  # what was asked for is done all the same
            raise

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
    state = retention_state(raw)
    if state is not None and state["done_to"] is not None:
        raise ExpiryBusyError(
            "changed retention settings are being applied; expired rows are deleted after that"
        )
    lease = {
        "owner": owner,
        "now": utc_text(now),
        "until": utc_text(now + LEASE),
        "longest": utc_text(now + LONGEST_LEASE),
    }
    if raw.execute(_TAKE_LEASE, lease).rowcount == 0:
        raise ExpiryBusyError("another process is deleting expired rows just now")


def _keep_lease(raw: sqlite3.Connection, owner: str, now: datetime) -> bool:
    """Show life; return whether the lease is still ours."""
    return raw.execute(_KEEP_LEASE, {"owner": owner, "until": utc_text(now + LEASE)}).rowcount > 0


def next_due(raw: sqlite3.Connection, moment: str) -> list[Due]:
    """Return the next rows to delete."""
    return raw.execute(_DUE, {"now": moment, "rows": PLANNED_ROWS}).fetchall()


def delete(raw: sqlite3.Connection, keys: Sequence[int], moment: str, owner: str) -> int:
    """Delete these rows, as long as the lease is ours; return how many there were.

    One statement, a transaction of its own: see `insert_entries` for why.
    """
    parameters = {"keys": orjson.dumps(keys).decode(), "now": moment, "owner": owner}
    return raw.execute(_DELETE, parameters).rowcount


def delete_doubts(raw: sqlite3.Connection, moment: str, rows: int, owner: str) -> int:
    """Delete expired entries of messages in doubt, at most `rows`; return how many there were."""
    return raw.execute(_DELETE_DOUBTS, {"now": moment, "rows": rows, "owner": owner}).rowcount


def count_expired(raw: sqlite3.Connection, moment: str) -> int:
    """Count what a run would delete."""
    return _integer(raw.execute(_COUNT_EXPIRED, {"now": moment}))


def oldest_expired(raw: sqlite3.Connection, moment: str) -> str | None:
    """Return when the oldest row that has expired was due; None when there is none."""
    found: str | None = raw.execute(_OLDEST_EXPIRED, {"now": moment}).fetchone()[0]
    return found


def vacuum(raw: sqlite3.Connection, pages: int) -> bool:
    """Give some free pages back; return whether there may be more."""
    before = _integer(raw.execute("PRAGMA freelist_count"))
    if not before:
        return False
    # Each row fetched is one page given back.
    raw.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    return 0 < _integer(raw.execute("PRAGMA freelist_count")) < before


def _integer(cursor: sqlite3.Cursor) -> int:
    return int(cursor.fetchone()[0])


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
_TAKE_LEASE = """
    INSERT INTO task_done_state (name, value, expires_at) VALUES ('expiry', :owner, :until)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at
    WHERE task_done_state.expires_at <= :now OR task_done_state.expires_at > :longest
"""
_KEEP_LEASE = "UPDATE task_done_state SET expires_at = :until WHERE name = 'expiry' AND value = :owner"
_DROP_LEASE = "DELETE FROM task_done_state WHERE name = 'expiry' AND value = :owner"
