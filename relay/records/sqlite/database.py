"""One SQLite file: how it is found, looked at before it is touched, opened, asked and closed.

Rules. What is not ours is never changed: the file is read before the first pragma that would write. All
work goes to the one writer connection, on aiosqlite's thread, a whole transaction at a time: one hop there
and back, however many statements, and nothing that a cancelled caller could leave half done. sqlite3's
errors end here, as `StoreError` (the file cannot be used now) or `RejectedRecordError` (this data never).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import aiosqlite

from relay.records.errors import MissingStoreError, OlderStoreError, RejectedRecordError, StoreError
from relay.records.tables import COLUMNS, NAMES, SCHEMA_VERSION, SCHEMA_VERSIONS, VERSION_TABLE

__all__ = [
    "Database",
    "check_columns",
    "connect",
    "explained",
    "in_transaction",
    "interrupt",
    "make_tables",
    "on_thread",
    "path_of",
    "version_in",
]

T = TypeVar("T")

FILE_MODE = 0o640
"""At most: the file holds addresses, so it is not for everyone; a group may read it (for a dashboard)."""
DIRECTORY_MODE = 0o750
JOURNAL_SIZE_LIMIT = 32 * 1024 * 1024
"""Octets that the write-ahead log keeps on disk after a checkpoint, however far a burst has stretched it."""
CHECKPOINT_PAGES = 4000
"""Pages in the write-ahead log before they are carried into the file: one written often is carried once."""
CACHE_KIB = 32 * 1024
"""Memory for pages, at most: the indexes are written all over, and the default (2 MiB) reads them again."""
SMALLEST = 512
"""Octets of the smallest database: SQLite takes a shorter file for an empty one, and would write over it."""
RETRY_EVERY_S = 0.02

_TABLES = Path(__file__).with_name("tables.sql")
"""What the migrations come to, as a script: a test compares the two."""
_PRESENT = f"SELECT name FROM sqlite_schema WHERE name IN ({', '.join('?' * len(NAMES))})"  # noqa: S608
_NEWEST = f"SELECT max(version_num) FROM {VERSION_TABLE}"  # noqa: S608
_DATA_ERRORS = frozenset(
    {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE}
)
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def path_of(url: str) -> Path:
    """Return the file that a `records.url` names.

    `sqlite:///` is followed by the path: relative to the working directory, or absolute with its own slash.
    Raises StoreError for every other URL; the text never repeats it, since it may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    if scheme != "sqlite" or not separator:
        raise StoreError("records.url: only sqlite:///PATH and postgresql://USER@HOST/DATABASE are known")
    if not rest.startswith("/"):
        raise StoreError("records.url: a SQLite URL has three slashes before its path: sqlite:///PATH")
    path = rest[1:]
    if path in {"", ":memory:"} or "?" in path:
        raise StoreError("records.url: sqlite:/// is followed by the path of a file, and by nothing else")
    return Path(path)


class Database:
    """An open SQLite file with its one writer connection."""

    def __init__(self, path: Path, connection: aiosqlite.Connection, busy_timeout: float) -> None:
        self.path = path
        self._connection = connection
        self._busy_timeout = busy_timeout
        self._closed = False
        # SQLite follows links, and keeps its files beside the one that it finds.
        self._log = f"{path.resolve()}-wal"
        self._file: tuple[int, int] | None = None
        self._log_file: tuple[int, int] | None = None
        self._parted = False  # from our file, which is not in its place any more

    @classmethod
    async def open(cls, path: Path, *, create: bool, busy_timeout: float, upgrade: bool = True) -> Database:
        """Open the file; make it first if there is none and `create`; bring its schema to this version.

        Without `upgrade`, one that has an older version is refused with OlderStoreError.

        `busy_timeout` is how long, in seconds, a lock that another process holds is waited for.
        Raises StoreError for a file that is missing, not ours, newer than this version or not writable.
        """
        # Two or three system calls, once, before anything is served.
        _find(path, create=create)
        try:
            connection = await connect(path, "rw", busy_timeout)
        except sqlite3.Error as error:
            raise explained(error, path, busy_timeout) from error
        database = cls(path, connection, busy_timeout)
        try:
            await database.run(lambda raw: _set_up(path, raw, busy_timeout, create=create, upgrade=upgrade))
            database._file, database._log_file = _identity(path), _identity(database._log)
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
        if _identity(self.path) != self._file:
            self._part(raw)
            raise _replaced(self.path)
        if self._log_file is not None and _identity(self._log) != self._log_file:
            raise _replaced(self._log)
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
            if self._file is not None and _identity(self.path) != self._file:
                await on_thread(self._connection, self._part)
        finally:
            await self._connection.close()


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


def explained(error: sqlite3.Error, path: Path, busy_timeout: float) -> StoreError:
    """Say in one line what sqlite3's error means for the operator."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # found by the sqlite3 module, not by SQLite: a value that has no place in a column
        return RejectedRecordError(f"{path}: {error}")
    primary = code & 0xFF
    if primary in _DATA_ERRORS:
        return RejectedRecordError(f"{path}: {error}")
    if primary in _LOCKED:
        return StoreError(
            f"{path}: locked by another process for more than {busy_timeout:g} s; "
            "find what holds it open (fuser) and end that"
        )
    return StoreError(f"{path}: {_ADVICE.get(primary, error)} ({error.sqlite_errorname})")


_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full; make room",
    sqlite3.SQLITE_IOERR: "reading or writing failed; look at the disk and the system's log",
    sqlite3.SQLITE_READONLY: "cannot be written; give the relay's user the file and its directory",
    sqlite3.SQLITE_PERM: "access is refused; give the relay's user the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; give the relay's user the file and its directory",
    sqlite3.SQLITE_CORRUPT: "is damaged; move it away, or put a backup in its place",
    sqlite3.SQLITE_NOTADB: "is not a SQLite database; it was left alone, name another file in records.url",
}


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


def _replaced(path: Path | str) -> StoreError:
    return StoreError(f"{path}: was removed or replaced while it was in use; restart the relay")


def _identity(path: Path | str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - for each commit
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _find(path: Path, *, create: bool) -> None:
    """Make sure that there is a file that can be written, as far as the file system can tell."""
    try:
        if not path.exists():
            if not create:
                raise MissingStoreError(
                    f"{path}: no such file; nothing was recorded yet, or records.url names another"
                )
            _make(path)
        if not path.is_file():
            raise StoreError(f"{path}: is not a file; name a file in records.url")
        if 0 < path.stat().st_size < SMALLEST:
            raise StoreError(f"{path}: {_ADVICE[sqlite3.SQLITE_NOTADB]}")
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; change records.url, or the rights of its path"
        ) from error
    effective = os.access in os.supports_effective_ids
    # SQLite follows links, and keeps its files beside the one that it finds.
    real = path.resolve()
    for file in (path, real.with_name(f"{real.name}-wal"), real.with_name(f"{real.name}-shm")):
        # One beside that cannot be written is no error for SQLite until something is to be written.
        if file.exists() and not os.access(file, os.R_OK | os.W_OK, effective_ids=effective):
            raise StoreError(f"{file}: cannot be written; give the relay's user the file")
    if not os.access(real.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise StoreError(f"{real.parent}: cannot be written, and SQLite keeps files beside its own there")


def _make(path: Path) -> None:
    """Make an empty file; here and not by SQLite for its mode, which the files beside it take over."""
    path.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    # EXCL: a file that exists is never opened here, since to close it would drop the locks that SQLite holds
    # on it elsewhere in this process (POSIX locks work so). If it has come up just now, another made it.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE))


def _set_up(path: Path, raw: sqlite3.Connection, busy_timeout: float, *, create: bool, upgrade: bool) -> None:
    """Look at the file, then make it ours."""
    version = version_in(path, raw)
    if version is None and not create:
        raise MissingStoreError(
            f"{path}: has no tables of the relay; nothing was recorded yet, or records.url names another file"
        )
    if version == SCHEMA_VERSION:
        check_columns(path, raw)
    elif version is not None and not upgrade:
        raise OlderStoreError(str(path), version)
    if version is None:
        # Only before the first page is written; it lets expiry give space back piece by piece.
        raw.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _write_ahead(raw, busy_timeout)
    raw.execute("PRAGMA synchronous = FULL")
    # The relay names no row that is not there, and a foreign key that is enforced costs each recipient a look
    # at its message, and within a trigger each message a look for recipients. A trigger deletes them with it.
    raw.execute("PRAGMA foreign_keys = OFF")
    # An INSERT of several rows keeps a journal of its own, so that it can be taken back alone; in a temporary
    # file it would cost more system calls than all else in a commit.
    raw.execute("PRAGMA temp_store = MEMORY")
    raw.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}")
    raw.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    raw.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    if version is None:
        version = make_tables(path, raw)
    if version != SCHEMA_VERSION:
        # Alembic takes longer to load than all the rest of a start.
        from relay.records import migrations

        migrations.upgrade(raw)
    raw.execute(_NEWEST).fetchone()  # the first read behind the switch makes the write-ahead log


def make_tables(path: Path, raw: sqlite3.Connection) -> str:
    """Make in a new file what the migrations would, all or nothing, and return the version that it then has.

    That of another process, if that was first.
    """

    def work(raw: sqlite3.Connection) -> str:
        if (version := version_in(path, raw)) is not None:
            return version
        for statement in _TABLES.read_text("utf-8").split(";\n"):
            raw.execute(statement)
        return SCHEMA_VERSION

    return in_transaction(raw, work)


def version_in(path: Path, raw: sqlite3.Connection) -> str | None:
    """Return the schema version of the file, None when it has nothing of ours; refuse what is not ours."""
    # One statement, thus one moment: another process may be making the tables just now.
    names = {row[0] for row in raw.execute(_PRESENT, NAMES)}
    if not names:
        return None
    if VERSION_TABLE not in names:
        raise StoreError(
            f"{path}: has a table or view {min(names)} that the relay did not make; "
            "name another file in records.url"
        )
    version = raw.execute(_NEWEST).fetchone()[0]
    if version not in SCHEMA_VERSIONS:
        raise StoreError(
            f"{path}: has schema version {version}, and this version of the relay knows none after "
            f"{SCHEMA_VERSION}; install the newer version again"
        )
    return str(version)


def check_columns(path: Path, raw: sqlite3.Connection) -> None:
    """Raise StoreError unless the tables have the columns that this version reads and writes."""
    for table, columns in COLUMNS.items():
        found = {row[0] for row in raw.execute("SELECT name FROM pragma_table_info(?)", (table,))}
        missing = sorted(set(columns) - found)
        if missing:
            raise StoreError(f"{path}: {table} has no column {missing[0]}; put a backup in the file's place")


def _write_ahead(raw: sqlite3.Connection, busy_timeout: float) -> None:
    """Switch the file to write-ahead logging, if it is not yet.

    SQLite does not wait for `busy_timeout` when another process is about to write just then (each could
    wait for the other for ever), as when two switch a new file at once, so the wait is here.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            raw.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _LOCKED or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_EVERY_S)
        else:
            return
