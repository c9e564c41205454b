"""Reads a SQLite file, changes nothing, makes no file beside it, and holds no lock that a writer waits for.

It holds nothing open between two reads.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import aiosqlite
import sqlalchemy as sa

from relay.records.errors import SlowReadError, StoreError
from relay.records.sqlite.connection import connect, interrupt, on_thread
from relay.records.sqlite.engine import in_transaction
from relay.records.sqlite.errors import explained
from relay.records.sqlite.file import SMALLEST, log_of, no_such_file, path_of
from relay.records.sqlite.tables import check_columns, version_in
from relay.records.tables import SCHEMA_VERSION

__all__ = ["ATTEMPTS", "SqliteReader"]

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
ATTEMPTS = 5
"""How often a read is begun again because a relay has started or stopped in the middle of it."""


class SqliteReader:
    """A SQLite file that is read; see `relay.records.queries.Reader`."""

    def __init__(self, path: Path, time_limit: float | None = None) -> None:
        self._path = path
        self._time_limit = time_limit

    @classmethod
    async def open(cls, url: str, *, time_limit: float | None = None) -> SqliteReader:
        """Return a reader of the file that `url` names; see `relay.records.queries.open_queries`."""
        reader = cls(path_of(url), time_limit)
        await reader._again_and_again(reader._check)
        return reader

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in one transaction, thus on one moment."""
        return await self._again_and_again(lambda raw: in_transaction(raw, "BEGIN", work))

    async def close(self) -> None:
        """Nothing is open."""

    def _check(self, raw: sqlite3.Connection) -> None:
        path = self._path
        version = version_in(path, raw)
        if version is None:
            raise StoreError(f"{path}: is not a store of the relay; name the right file in records.url")
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: has schema version {version}, this version of the relay reads {SCHEMA_VERSION}; "
                "start the relay on it once, which brings it up"
            )
        check_columns(path, raw)

    async def _again_and_again(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on a connection that cannot write and makes no files.

        While a relay has the store open, its write-ahead log is there, and SQLite's read-only mode shares the
        files that exist. Without that log nobody has it open, and the same mode would make log and index and
        leave them there (owned by whoever reads, in the way of the relay's user), or fail in a directory that
        it may not write. So such a file is read as one that does not change (`immutable`), and looked at
        again afterwards: a relay that starts has its log there before it changes anything.
        """
        for _ in range(ATTEMPTS):
            before = _look(self._path)
            try:
                result = await self._read_once("ro" if before == _IN_USE else "ro&immutable=1", work)
            except StoreError:
                if _look(self._path) == before:
                    raise
                continue
            if before in (_IN_USE, _look(self._path)):
                return result
        raise StoreError(f"{self._path}: changes hands all the time; try again")

    async def _read_once(self, mode: str, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = await connect(self._path, mode, BUSY_TIMEOUT_S)
            try:
                return await self._in_time(connection, work)
            finally:
                await connection.close()
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_INTERRUPT and self._time_limit is not None:
                raise SlowReadError(self._time_limit) from error
            if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
                raise StoreError(
                    f"{self._path}: its -wal and -shm files cannot be used by this user; run the command as "
                    f"the relay's user, or let its group read them ({error.sqlite_errorname})"
                ) from error
            raise explained(error, self._path, BUSY_TIMEOUT_S) from error

    async def _in_time(self, connection: aiosqlite.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work`; end the statement that runs, from outside, when the time is over or nobody waits."""
        loop = asyncio.get_running_loop()
        limit = self._time_limit
        bound = None if limit is None else loop.call_later(limit, interrupt, connection)
        try:
            return await on_thread(connection, work)
        except asyncio.CancelledError:
            interrupt(connection)
            raise
        finally:
            if bound is not None:
                bound.cancel()


_IN_USE = ("in use",)


def _look(path: Path) -> tuple[object, ...]:
    """Return _IN_USE, or what changes when the file does; refuse what cannot be read."""
    try:
        found = path.stat()
        if not path.is_file():
            raise StoreError(f"{path}: is not a file; name a file in records.url")
        if found.st_size < SMALLEST:
            raise StoreError(f"{path}: is not a store of the relay; name the right file in records.url")
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise StoreError(f"{path}: cannot be read; run the command as the relay's user, or as its group")
        in_use = log_of(path).exists()
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; change records.url, or the rights of its path"
        ) from error
    return _IN_USE if in_use else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
