"""One SQLite file, open: its one writer connection, and readers beside it.

Rules. All work that changes the file goes to the writer connection, in its turn. sqlite3's errors end here,
as `StoreError` (the file cannot be used now) or `RejectedRecordError` (this data never). Nothing is written
to a file that is not in its place any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import aiosqlite

from relay.records.errors import StoreError
from relay.records.sqlite.connection import connect, in_transaction, on_thread
from relay.records.sqlite.errors import explained
from relay.records.sqlite.file import Place, find
from relay.records.sqlite.setup import set_up

__all__ = ["Database"]

T = TypeVar("T")


class Database:
    """An open SQLite file with its one writer connection."""

    def __init__(self, path: Path, connection: aiosqlite.Connection, busy_timeout: float) -> None:
        self.path = path
        self._connection = connection
        self._busy_timeout = busy_timeout
        self._closed = False
        self._place: Place | None = None  # once it is set up
        self._parted = False  # from our file, which is not in its place any more

    @classmethod
    async def open(cls, path: Path, *, create: bool, busy_timeout: float, upgrade: bool = True) -> Database:
        """Open the file; make it first if there is none and `create`; bring its schema to this version.

        Without `upgrade`, one that has an older version is refused with OlderStoreError.

        `busy_timeout` is how long, in seconds, a lock that another process holds is waited for.
        Raises StoreError for a file that is missing, not ours, newer than this version or not writable.
        """
        # Two or three system calls, once, before anything is served.
        find(path, create=create)
        try:
            connection = await connect(path, "rw", busy_timeout)
        except sqlite3.Error as error:
            raise explained(error, path, busy_timeout) from error
        database = cls(path, connection, busy_timeout)
        try:
            await database.run(lambda raw: set_up(path, raw, busy_timeout, create=create, upgrade=upgrade))
            database._place = Place(path)
        except BaseException:
            await database.close()
            raise
        return database

    def run(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run `work` on the writer connection, after what was asked before; its result is what it returns.

        A cancelled caller stops waiting; `work`, once asked for, is done all the same.
        """
        if self._closed:
            closed: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            closed.set_exception(StoreError(f"{self.path}: the store is closed"))
            return closed
        return on_thread(self._connection, partial(self._explaining, work))

    def transaction(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run `work` as `run` does, within one transaction: durable when done, undone whole on any error."""
        return self.statement(lambda raw: in_transaction(raw, work))

    def statement(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run `work`, which writes with one statement, a transaction of its own, or sees to its own."""
        return self.run(partial(self._in_its_place, work))

    def _explaining(self, work: Callable[[sqlite3.Connection], T], raw: sqlite3.Connection) -> T:
        try:
            if self._closed:  # what waits in line is tried once; the stop is not held up by another's lock
                raw.execute("PRAGMA busy_timeout = 0")
            return work(raw)
        except sqlite3.Error as error:
            raise explained(error, self.path, self._busy_timeout) from error

    def _in_its_place(self, work: Callable[[sqlite3.Connection], T], raw: sqlite3.Connection) -> T:
        # SQLite would go on writing to a file that nobody can find any more, without an error.
        place = self._place
        if place is not None:
            if place.left:
                self._part(raw)
                raise _replaced(self.path)
            if (log := place.log_replaced) is not None:
                raise _replaced(log)
        return work(raw)

    def _part(self, raw: sqlite3.Connection) -> None:
        """Carry the write-ahead log into our file, wherever it is now, and empty it, once.

        SQLite leaves the log as it is, and whatever file comes in the place would get the pages of another.
        What is in the log behind that is not ours.
        """
        if not self._parted:
            with contextlib.suppress(sqlite3.Error):
                busy, _, _ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._parted = not busy

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on a connection of its own that cannot write: it may take long and holds nobody up."""
        try:
            connection = await connect(self.path, "ro", self._busy_timeout)
            try:
                return await on_thread(connection, work)
            finally:
                await connection.close()
        except sqlite3.Error as error:
            raise explained(error, self.path, self._busy_timeout) from error

    async def close(self) -> None:
        """Finish what was asked for, then close the file. Again: nothing happens."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._place is not None and self._place.left:
                await on_thread(self._connection, self._part)
        finally:
            await self._connection.close()


def _replaced(path: Path | str) -> StoreError:
    return StoreError(f"{path}: was removed or replaced while it was in use; restart the relay")
