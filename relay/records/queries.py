"""The reading side of the store: which sends are there, and which messages in doubt, newest first.

Rules. Reading changes nothing: no store is made, no schema is brought up, and no lock is held that a writer
would wait for. Rows come in pages, each one short read of its own moment, so that neither memory nor the
database grows with what is asked for; a page goes on where the last one ended, whatever was recorded or
expired meanwhile. Statements are SQLAlchemy's (`search`), so that they are the same for both databases;
nobody but `open_queries` knows which one a URL names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from relay.records.by import By
from relay.records.over_time import counts_over_time
from relay.records.schema import task_done, task_in_doubt
from relay.records.search import fetch_doubts, fetch_sends, page_of_doubts, page_of_sends, sends_by_id
from relay.records.sends import InDoubt, Key, Send, SendFilter
from relay.records.statistics import Statistics, counted, slot_of, statement_of
from relay.records.store import is_postgres

__all__ = ["PAGE_ROWS", "Queries", "Reader", "open_queries"]

T = TypeVar("T")
Row = TypeVar("Row", Send, InDoubt)

ROWS_AT_ONCE = 1000
"""Rows that are counted in memory at once."""
PAGE_ROWS = 200
"""Rows in memory at once; each may have a thousand recipients."""


class Reader(Protocol):
    """A database that is read."""

    async def read(self, work: Callable[[sa.Connection], T], /) -> T:
        """Run `work`, which only reads, on one moment of the database; raise StoreError where that fails.

        `work` may be called in another thread, and more than once: it returns values, and touches nothing
        else.
        """

    async def close(self) -> None:
        """End what is open."""


class Queries:
    """A store that is read."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        """The database behind it."""

    async def close(self) -> None:
        """End what is open."""
        await self.reader.close()

    def sends(self, wanted: SendFilter, *, limit: int | None = None) -> AsyncIterator[list[Send]]:
        """Yield the rows that `wanted` describes, newest first, in pages; at most `limit`, None: all.

        Raises StoreError when the store cannot be read any more.
        """
        return _pages(lambda rows, after: self.page(wanted, rows, after), limit)

    def doubts(self, wanted: SendFilter, *, limit: int | None = None) -> AsyncIterator[list[InDoubt]]:
        """Yield the messages in doubt that `wanted` describes, as `sends` does."""
        return _pages(lambda rows, after: self.page_of_doubts(wanted, rows, after), limit)

    async def page(self, wanted: SendFilter, rows: int, after: Key | None = None) -> list[Send]:
        """Return the next `rows` rows that `wanted` describes, newest first, those behind `after`."""
        return await self._page(page_of_sends(wanted, rows, after))

    async def page_of_doubts(self, wanted: SendFilter, rows: int, after: Key | None = None) -> list[InDoubt]:
        """Return the same of the messages in doubt."""
        statement = page_of_doubts(wanted, rows, after)
        return await self.reader.read(lambda connection: fetch_doubts(connection, statement))

    async def recorded_after(self, wanted: SendFilter, key: int, rows: int) -> list[Send]:
        """Return the first `rows` rows with a greater `id`, in its order: as they were recorded."""
        return await self._page(sends_by_id(wanted, rows, key))

    async def newest_id(self) -> int:
        """Return the greatest `id` there is, 0 without any row."""
        newest = sa.select(sa.func.coalesce(sa.func.max(task_done.c.id), 0))
        return await self.reader.read(lambda connection: int(connection.execute(newest).scalar_one()))

    async def statistics(
        self,
        wanted: SendFilter,
        by: Sequence[By],
        *,
        zone: tzinfo | None = UTC,
        detail: bool = False,
        limit: int | None = None,
    ) -> Statistics:
        """Return how much was sent of what `wanted` describes, counted by one or two things.

        Times are in `zone`, None: the machine's. At most `limit` counts (None: all): the biggest,
        or the latest.
        """
        timed = any(each.time for each in by)
        slot = slot_of(by, zone, wanted.since, datetime.now(UTC)) if timed else "hour"
        # A limit of counts is none of rows, where those of a day's hours make one count.
        statement = statement_of(wanted, by, detail=detail, slot=slot, limit=None if timed else limit)

        def count(connection: sa.Connection) -> Statistics:
            rows = connection.execute(statement, execution_options={"yield_per": ROWS_AT_ONCE})
            return counted(rows, by, zone, detail=detail, limit=limit)

        return await self.reader.read(count)

    async def over_time(self, begin: datetime, step: timedelta, slots: int) -> dict[str | None, list[int]]:
        """Return how many messages of each task type were sent in each of `slots` slots from `begin` on."""
        return await self.reader.read(lambda connection: counts_over_time(connection, begin, step, slots))

    async def count_in_doubt(self) -> int:
        """Return how many messages are in doubt. Raises StoreError when the store cannot be read."""
        count = sa.select(sa.func.count()).select_from(task_in_doubt)
        return await self.reader.read(lambda connection: int(connection.execute(count).scalar_one()))

    async def _page(self, page: sa.Select[Any]) -> list[Send]:
        return await self.reader.read(lambda connection: fetch_sends(connection, page))


async def open_queries(url: str, *, time_limit: float | None = None) -> Queries:
    """Return the store at `url`, once it is seen to be one that this version can read.

    A read that takes longer than `time_limit` seconds raises SlowReadError. Raises StoreError, in one line,
    for one that is missing, foreign, unreadable or of another schema version.
    """
    if is_postgres(url):
        from relay.records.postgres.reader import PostgresReader

        return Queries(await PostgresReader.open(url, time_limit=time_limit))
    from relay.records.sqlite.reader import SqliteReader

    return Queries(await SqliteReader.open(url, time_limit=time_limit))


async def _pages(
    page: Callable[[int, Key | None], Awaitable[list[Row]]], limit: int | None
) -> AsyncIterator[list[Row]]:
    """Yield pages, each behind the one before, until there are no more rows or `limit` is reached."""
    after: Key | None = None
    left = limit
    while left is None or left > 0:
        rows = PAGE_ROWS if left is None else min(left, PAGE_ROWS)
        found = await page(rows, after)
        if found:
            yield found
        if len(found) < rows:
            return
        after = found[-1].key
        left = None if left is None else left - rows
