"""Changes a SQLite file as a command does, beside a relay that runs: what is erased is written over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TypeVar

import aiosqlite
import sqlalchemy as sa

from relay.records.sqlite.connection import connect, on_thread
from relay.records.sqlite.engine import in_transaction
from relay.records.sqlite.errors import explained
from relay.records.sqlite.file import path_of

__all__ = ["SqliteEraser"]

T = TypeVar("T")

BUSY_TIMEOUT_S = 20.0


class SqliteEraser:
    """A SQLite file that is changed; see `relay.records.forgetting.Eraser`."""

    def __init__(self, connection: aiosqlite.Connection, url: str) -> None:
        self._connection = connection
        self._path = path_of(url)

    @classmethod
    async def open(cls, url: str) -> SqliteEraser:
        """Open the file that `url` names."""
        try:
            connection = await connect(path_of(url), "rw", BUSY_TIMEOUT_S)
            try:
                await on_thread(connection, _set_up)
            except BaseException:
                await connection.close()
                raise
        except sqlite3.Error as error:
            raise explained(error, path_of(url), BUSY_TIMEOUT_S) from error
        return cls(connection, url)

    async def write(self, work: Callable[[sa.Connection], T], *, undo: bool) -> T:
        """Run `work` in one transaction, which `undo` takes back."""
        try:
            return await on_thread(
                self._connection, lambda raw: in_transaction(raw, "BEGIN IMMEDIATE", work, undo=undo)
            )
        except sqlite3.Error as error:
            raise explained(error, self._path, BUSY_TIMEOUT_S) from error

    async def close(self) -> None:
        """Carry the log into the file, as far as readers let it, and close."""
        try:
            await on_thread(
                self._connection, lambda raw: raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            )
        except sqlite3.Error as error:
            raise explained(error, self._path, BUSY_TIMEOUT_S) from error
        finally:
            await self._connection.close()


def _set_up(raw: sqlite3.Connection) -> None:
    raw.execute("PRAGMA synchronous = FULL")
    raw.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten with zeros
