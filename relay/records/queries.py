"""The reading side of the store: which sends are there, and which messages in doubt, newest first.

Rules. Reading changes nothing: no store is made, no schema is brought up, no file comes up beside the
store's own, and no lock is held that a writer would wait for. Rows come in pages, each one short read of its
own moment, so that neither memory nor the write-ahead log grows with what is asked for; a page goes on where
the last one ended, whatever was recorded or expired meanwhile. Statements are SQLAlchemy's, against `schema`
alone; which index leads is said and not guessed, since SQLite keeps no statistics here and would, for one,
read every row of a task type to find one message in it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from relay.records.errors import StoreError
from relay.records.filters import (
    RECIPIENT_INDEXES,
    Key,
    SendFilter,
    conditions_of,
    leading_index,
    received_by,
    window_of,
)
from relay.records.model import Json
from relay.records.patterns import Wanted
from relay.records.schema import SCHEMA_VERSION, task_done, task_done_recipient, task_in_doubt
from relay.records.sqlite import (
    SMALLEST,
    check_columns,
    connect,
    explained,
    on_thread,
    path_of,
    version_in,
)

__all__ = [
    "COLUMNS",
    "PAGE_ROWS",
    "InDoubt",
    "Queries",
    "Send",
    "SendFilter",
    "page_of_doubts",
    "page_of_sends",
    "recipients_of",
]

T = TypeVar("T")
PAGE_ROWS = 200
"""Rows in memory at once; each may have a thousand recipients."""
BUSY_TIMEOUT_S = 5.0
ATTEMPTS = 5
"""How often a read is begun again because a relay has started or stopped in the middle of it."""

COLUMNS = tuple(column.name for column in task_done.columns)
"""The columns of `task_done`, in their order."""


@dataclass(frozen=True, slots=True)
class Send:
    """One row of `task_done`, with the recipients that the upstream accepted, in their order.

    Times are aware, UTC; `size` is in octets, `duration_ms` in milliseconds.
    """

    id: int
    task_id: str
    client_task_id: str | None
    task_type: str
    sender: str
    sender_domain: str
    client: str
    sent_at: datetime
    expires_at: datetime | None
    upstream: str
    upstream_reply: str
    message_id: str | None
    size: int
    duration_ms: int
    data: dict[str, Json]
    recipients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InDoubt:
    """One row of `task_in_doubt`, with the recipients that the upstream had accepted, in their order.

    Times are aware, UTC; `size` is in octets, `duration_ms` in milliseconds, from MAIL to `since`.
    """

    id: int
    task_id: str
    client_task_id: str | None
    task_type: str
    sender: str
    sender_domain: str
    client: str
    since: datetime
    expires_at: datetime | None
    upstream: str
    reason: str
    message_id: str | None
    size: int
    duration_ms: int
    data: dict[str, Json]
    recipients: tuple[str, ...]


class Queries:
    """A store that is read. It holds nothing open between two reads, so there is nothing to close."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    async def open(cls, url: str) -> Queries:
        """Return the store at `url`, once it is seen to be one that this version can read.

        Raises StoreError, in one line, for a file that is missing, foreign, unreadable or of another schema
        version.
        """
        queries = cls(path_of(url))
        await queries._read(queries._check)
        return queries

    async def sends(self, wanted: SendFilter, *, limit: int | None = None) -> AsyncIterator[list[Send]]:
        """Yield the rows that `wanted` describes, newest first, in pages; at most `limit`, None: all.

        Raises StoreError when the store cannot be read any more.
        """
        after: Key | None = None
        left = limit
        while left is None or left > 0:
            rows = PAGE_ROWS if left is None else min(left, PAGE_ROWS)
            page = await self._page(wanted, rows, after)
            if page:
                yield page
            if len(page) < rows:
                return
            after = page[-1].sent_at, page[-1].id
            left = None if left is None else left - rows

    async def doubts(self, wanted: SendFilter, *, limit: int | None = None) -> AsyncIterator[list[InDoubt]]:
        """Yield the messages in doubt that `wanted` describes, as `sends` does."""
        after: Key | None = None
        left = limit
        while left is None or left > 0:
            rows = PAGE_ROWS if left is None else min(left, PAGE_ROWS)
            page = await self._read(partial(_fetch_doubts, page=page_of_doubts(wanted, rows, after)))
            if page:
                yield page
            if len(page) < rows:
                return
            after = page[-1].since, page[-1].id
            left = None if left is None else left - rows

    async def count_in_doubt(self) -> int:
        """Return how many messages are in doubt. Raises StoreError when the store cannot be read."""
        return await self._read(
            lambda raw: int(raw.execute("SELECT count(*) FROM task_in_doubt").fetchone()[0])
        )

    async def _page(self, wanted: SendFilter, rows: int, after: Key | None) -> list[Send]:
        return await self._read(lambda raw: _fetch(raw, page_of_sends(wanted, rows, after)))

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

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
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
                return await on_thread(connection, work)
            finally:
                await connection.close()
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
                raise StoreError(
                    f"{self._path}: its -wal and -shm files cannot be used by this user; run the command as "
                    f"the relay's user, or let its group read them ({error.sqlite_errorname})"
                ) from error
            raise explained(error, self._path, BUSY_TIMEOUT_S) from error


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
        in_use = path.with_name(path.name + "-wal").exists()
    except FileNotFoundError:
        raise StoreError(
            f"{path}: no such file; nothing was recorded yet, or records.url names another"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; change records.url, or the rights of its path"
        ) from error
    return _IN_USE if in_use else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _fetch(raw: sqlite3.Connection, page: sa.Select[Any]) -> list[Send]:
    """Read the rows of a page and all their recipients: two statements, one moment."""
    engine = sa.create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("BEGIN")
        rows = connection.execute(page).mappings().all()
        recipients: dict[int, list[str]] = {row["id"]: [] for row in rows}
        for key, recipient in connection.execute(recipients_of(recipients)):
            recipients[key].append(recipient)
    return [Send(**row, recipients=tuple(recipients[row["id"]])) for row in rows]


def _fetch_doubts(raw: sqlite3.Connection, page: sa.Select[Any]) -> list[InDoubt]:
    engine = sa.create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    with engine.begin() as connection:
        rows = connection.execute(page).mappings().all()
    return [InDoubt(**{**row, "recipients": tuple(row["recipients"])}) for row in rows]


def recipients_of(keys: Iterable[int]) -> sa.Select[Any]:
    """Return the statement for the recipients of the rows with these ids, each row's in their order."""
    table = task_done_recipient.c
    return (
        sa.select(table.task_done_id, table.recipient)
        .where(table.task_done_id.in_(list(keys)))
        .order_by(table.task_done_id, table.ordinal)
    )


def page_of_sends(wanted: SendFilter, rows: int, after: Key | None = None) -> sa.Select[Any]:
    """Return the statement for the next `rows` rows that `wanted` describes, those before `after`."""
    table = task_done.c
    leading = leading_index(wanted)
    conditions = [*conditions_of(wanted, table), *window_of(wanted, after, table.sent_at, table.id)]
    if wanted.recipient is not None:
        received = received_by(wanted.recipient, wanted.aliases)
        if leading in RECIPIENT_INDEXES:
            return _page_by_recipient(received, leading, wanted, rows, after)
        conditions.append(sa.exists().where(task_done_recipient.c.task_done_id == table.id, received))
    return (
        sa.select(task_done)
        .with_hint(task_done, f"INDEXED BY {leading}", "sqlite")
        .where(*conditions)
        .order_by(table.sent_at.desc(), table.id.desc())
        .limit(rows)
    )


def page_of_doubts(wanted: SendFilter, rows: int, after: Key | None = None) -> sa.Select[Any]:
    """Return the statement for the next `rows` messages in doubt that `wanted` describes, before `after`.

    By time, whatever the filter: they are few, unless something is very wrong.
    """
    table = task_in_doubt.c
    conditions = [*conditions_of(wanted, table), *window_of(wanted, after, table.since, table.id)]
    if wanted.recipient is not None:
        # SQLite's function; PostgreSQL has jsonb_array_elements_text for it.
        each = sa.func.json_each(table.recipients).table_valued("value")
        found = sa.cast(each.c.value, sa.Text())
        conditions.append(sa.exists().where(Wanted.of(wanted.recipient).matches(found, None, wanted.aliases)))
    return (
        sa.select(task_in_doubt)
        .with_hint(task_in_doubt, "INDEXED BY ix_task_in_doubt_since", "sqlite")
        .where(*conditions)
        .order_by(table.since.desc(), table.id.desc())
        .limit(rows)
    )


def _page_by_recipient(
    received: sa.ColumnElement[bool], leading: str, wanted: SendFilter, rows: int, after: Key | None
) -> sa.Select[Any]:
    """The same, led by an index of the recipients, which have the time of their row.

    DISTINCT, since a message may have gone to several in a domain, or to one of them twice.
    """
    moment, key = task_done_recipient.c.sent_at, task_done_recipient.c.task_done_id
    found = (
        sa.select(moment, key)
        .with_hint(task_done_recipient, f"INDEXED BY {leading}", "sqlite")
        .where(received, *window_of(wanted, after, moment, key))
        .distinct()
        .order_by(moment.desc(), key.desc())
        .limit(rows)
    )
    others = conditions_of(wanted, task_done.c)
    if others:
        found = found.join_from(task_done_recipient, task_done, task_done.c.id == key).where(*others)
    page = found.subquery("page")
    return (
        sa.select(task_done)
        .join_from(page, task_done, task_done.c.id == page.c.task_done_id)
        .order_by(page.c.sent_at.desc(), page.c.task_done_id.desc())
    )
