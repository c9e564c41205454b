"""How page and API read the records: beside the mail, never in its way.

Rules. Reads have connections of their own, in threads or of the driver's, and hold no lock that a writer
waits for. A few run at a time, a few more wait, the rest is told to come again; each has a limit in time.
The store is opened when it is first read, so that a relay whose store is away starts all the same, and what
reads it is loaded then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Final, TypeVar
from uuid import UUID

from relay.late import late
from relay.records.by import By
from relay.records.errors import StoreError
from relay.records.sends import InDoubt, Key, Send, SendFilter

if TYPE_CHECKING:
    from relay.records.queries import Queries
    from relay.records.statistics import Statistics

__all__ = ["BusyError", "Reading"]

T = TypeVar("T")

READS: Final = 3
"""Reads that run at the same time."""
WAITING: Final = 16
"""Reads that wait for their turn."""
TIME_LIMIT_S: Final = 5.0


class BusyError(StoreError):
    """Too many read at the same time."""


class Reading:
    """The records, to be read while the relay runs."""

    def __init__(
        self,
        url: str,
        *,
        aliases: Callable[[str], tuple[str, ...]] | None = None,
        time_limit: float = TIME_LIMIT_S,
    ) -> None:
        """`aliases` gives the other spellings under which a recipient may be kept."""
        self.aliases = aliases
        self._url = url
        self._time_limit = time_limit
        self._turn = asyncio.Semaphore(READS)
        self._waiting = 0
        self._opening = asyncio.Lock()
        self._queries: Queries | None = None

    async def search(self, wanted: SendFilter, *, rows: int, after: Key | None = None) -> list[Send]:
        """Return the next `rows` sends that `wanted` describes, newest first, those behind `after`."""
        return await self._read(lambda queries: queries.page(wanted, rows, after))

    async def in_doubt(self, wanted: SendFilter, *, rows: int, after: Key | None = None) -> list[InDoubt]:
        """Return the same of the messages in doubt."""
        return await self._read(lambda queries: queries.page_of_doubts(wanted, rows, after))

    async def send(self, task_id: UUID) -> Send | InDoubt | None:
        """Return everything about one send, or one message in doubt; None if there is neither."""
        wanted = SendFilter(task_id=task_id)

        async def find(queries: Queries) -> Send | InDoubt | None:
            found: Sequence[Send | InDoubt] = await queries.page(wanted, 1)
            found = found or await queries.page_of_doubts(wanted, 1)
            return found[0] if found else None

        return await self._read(find)

    async def statistics(
        self,
        wanted: SendFilter,
        by: Sequence[By],
        *,
        zone: tzinfo | None,
        detail: bool = False,
        limit: int = 1000,
    ) -> Statistics:
        """Return how much was sent, see `Queries.statistics`."""
        return await self._read(
            lambda queries: queries.statistics(wanted, by, zone=zone, detail=detail, limit=limit)
        )

    async def over_time(self, begin: datetime, step: timedelta, slots: int) -> dict[str | None, list[int]]:
        """Return how many messages of each type were sent in each slot, see `Queries.over_time`."""
        return await self._read(lambda queries: queries.over_time(begin, step, slots))

    async def count_in_doubt(self) -> int:
        """Return how many messages are in doubt."""
        return await self._read(lambda queries: queries.count_in_doubt())

    async def bounded(self, read: Callable[[], Awaitable[T]]) -> T:
        """Run what reads the records by connections of its own, under the same bounds; raises StoreError."""

        async def in_time() -> T:
            try:
                async with asyncio.timeout(self._time_limit):
                    return await read()
            except TimeoutError:
                raise StoreError(f"to count this takes longer than {self._time_limit:g} s") from None

        return await self._in_turn(in_time)

    async def close(self) -> None:
        """End what is open."""
        if self._queries is not None:
            queries, self._queries = self._queries, None
            await queries.close()

    async def _read(self, work: Callable[[Queries], Awaitable[T]]) -> T:
        """Run `work` when it is its turn; raises StoreError, SlowReadError and BusyError among them."""

        async def opened() -> T:
            return await work(await self._open())

        return await self._in_turn(opened)

    async def _in_turn(self, read: Callable[[], Awaitable[T]]) -> T:
        if self._waiting >= WAITING:
            raise BusyError("too many searches at the same time; try again in a moment")
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            return await read()
        finally:
            self._turn.release()

    async def _open(self) -> Queries:
        async with self._opening:
            if self._queries is None:
                open_queries = await late(_load)
                self._queries = await open_queries(self._url, time_limit=self._time_limit)
            return self._queries


def _load() -> Callable[..., Awaitable[Queries]]:
    """Load SQLAlchemy, which is as slow to load as half a start."""
    from relay.records.queries import open_queries

    return open_queries
