"""A connection to a SQLite file: opened and ended in order, and asked on aiosqlite's thread.

Rules. Work is done a whole transaction at a time: one hop to the thread and back, however many statements,
and nothing that a cancelled caller could leave half done.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import aiosqlite

__all__ = ["connect", "in_transaction", "interrupt", "on_thread"]

T = TypeVar("T")


async def connect(path: Path, mode: str, busy_timeout: float) -> aiosqlite.Connection:
    """Open the file at `path` with SQLite's `mode` (ro, rw); raise sqlite3.Error. Never makes a file."""
    failed: list[sqlite3.Error] = []

    def connector() -> sqlite3.Connection:
        # As a URI, since only so can SQLite be told never to make the file (with its own idea of a mode).
        uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
        try:
            # isolation_level None: no transaction but those that are begun in so many words.
            return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=busy_timeout)
        except sqlite3.Error as error:
            # aiosqlite does not wait for its thread after a connector that raised, and the thread then
            # speaks to an event loop that may be closed: give it something that can be closed in order.
            failed.append(error)
            return sqlite3.connect(":memory:")

    opening = asyncio.ensure_future(_opened(aiosqlite.Connection(connector, iter_chunk_size=1)))
    try:
        connection = await asyncio.shield(opening)
    except asyncio.CancelledError:
        # Nor does it wait after a cancellation: open, which takes no long, then close in order.
        await (await opening).close()
        raise
    if failed:
        await connection.close()
        raise failed[0]
    return connection


async def _opened(connection: aiosqlite.Connection) -> aiosqlite.Connection:
    return await connection


def on_thread(connection: aiosqlite.Connection, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
    """Run `work` on the connection's thread, where no other work can come between its statements.

    The one place that uses what is beneath aiosqlite's public methods, the queue of its thread: they cost a
    hop to the thread and back for every statement, and can be cancelled between two of them. A future, for
    who is called back when it is done: a task that awaits it would cost a commit two rounds of the loop.
    """
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    connection._tx.put_nowait((done, partial(work, connection._conn)))  # noqa: SLF001
    return done


def interrupt(connection: aiosqlite.Connection) -> None:
    """End the statement that runs on the connection's thread, if one does, with SQLITE_INTERRUPT."""
    connection._conn.interrupt()  # noqa: SLF001


def in_transaction(raw: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` within one transaction: durable on return, undone whole on any error."""
    # IMMEDIATE: the lock is taken at once, so that no other process can write between our reading and our
    # writing (a deferred transaction would then fail without waiting).
    raw.execute("BEGIN IMMEDIATE")
    try:
        result = work(raw)
        raw.execute("COMMIT")
    except BaseException:
        # SQLite itself has ended the transaction after some errors (a full disk); if even this fails, the
        # first error is the one to tell.
        with contextlib.suppress(sqlite3.Error):
            if raw.in_transaction:
                raw.execute("ROLLBACK")
        raise
    return result
