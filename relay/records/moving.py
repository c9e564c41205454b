"""Carries all that one store has into another: rows, recipients, messages in doubt.

Rules. The source is only read. What is there already stays as it is, so that a move that was cut short is
begun again and soon comes to where it was; each batch is looked for in its new place after it was written,
with its recipients. A row's end follows the retention that the new store was opened with, as at every start
of a relay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from relay.records.errors import RejectedRecordError, StoreError
from relay.records.model import Doubt, Entry, Record
from relay.records.queries import Queries
from relay.records.schema import task_done, task_done_recipient, task_in_doubt
from relay.records.search import fetch_doubts, fetch_sends
from relay.records.sends import InDoubt, Send
from relay.records.store import Store

__all__ = ["Moved", "count_all", "move"]

BATCH = 500


@dataclass(slots=True)
class Moved:
    """What has its place in the new store, and what that does not take: task ids, and why."""

    sends: int = 0
    recipients: int = 0
    in_doubt: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Messages that are done with."""
        return self.sends + self.in_doubt + len(self.rejected)


async def count_all(source: Queries) -> int:
    """Return how many messages there are to be moved."""
    return await source.reader.read(
        lambda connection: sum(
            int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())
            for table in (task_done, task_in_doubt)
        )
    )


async def move(source: Queries, store: Store, there: Queries, on_progress: Callable[[int], None]) -> Moved:
    """Carry everything from `source` into `store`; `there` reads that store.

    `on_progress` is told how many messages are done with. Raises StoreError, also if what was written is not
    found; what is done stays done.
    """
    moved = Moved()
    after = 0
    while sends := await source.reader.read(partial(_sends, after=after)):
        entries = [_record(send) for send in sends]
        refused = await _carry(entries, store, there, task_done, moved)
        moved.sends += len(sends) - refused
        not_taken = {key for key, _ in moved.rejected}
        moved.recipients += sum(len(send.recipients) for send in sends if send.task_id not in not_taken)
        after = sends[-1].id
        on_progress(moved.rows)
    after = 0
    while doubts := await source.reader.read(partial(_doubts, after=after)):
        refused = await _carry([_doubt(each) for each in doubts], store, there, task_in_doubt, moved)
        moved.in_doubt += len(doubts) - refused
        after = doubts[-1].id
        on_progress(moved.rows)
    return moved


async def _carry(
    entries: Sequence[Entry], store: Store, there: Queries, table: sa.Table, moved: Moved
) -> int:
    """Have the entries in the store; return how many it does not take."""
    before = len(moved.rejected)
    if await _missing(entries, there, table):
        try:
            await store.write(entries)
        except RejectedRecordError:
            await _one_by_one(entries, store, moved)
        refused = {key for key, _ in moved.rejected[before:]}
        missing = await _missing([each for each in entries if str(each.task_id) not in refused], there, table)
        if missing:
            raise StoreError(f"{missing} rows or recipients were written and are not found in {table.name}")
    return len(moved.rejected) - before


async def _one_by_one(entries: Sequence[Entry], store: Store, moved: Moved) -> None:
    for entry in entries:
        try:
            await store.write([entry])
        except RejectedRecordError as error:
            moved.rejected.append((str(entry.task_id), str(error)))


async def _missing(entries: Sequence[Entry], there: Queries, table: sa.Table) -> int:
    """Count what the new store does not have: rows, and their recipients. A row stands for its doubt, too."""
    keys = [str(each.task_id) for each in entries]
    wanted = len(keys) + sum(len(each.recipients) for each in entries if isinstance(each, Record))
    rows = sa.select(sa.func.count()).select_from(task_done).where(task_done.c.task_id.in_(keys))
    doubts = sa.select(sa.func.count()).select_from(task_in_doubt).where(task_in_doubt.c.task_id.in_(keys))
    recipients = (
        sa.select(sa.func.count())
        .select_from(task_done_recipient)
        .join(task_done, task_done.c.id == task_done_recipient.c.task_done_id)
        .where(task_done.c.task_id.in_(keys))
    )
    counted = (rows, recipients) if table is task_done else (rows, doubts)

    def count(connection: sa.Connection) -> int:
        return sum(int(connection.execute(each).scalar_one()) for each in counted)

    return max(0, wanted - await there.reader.read(count))


def _sends(connection: sa.Connection, after: int) -> list[Send]:
    page = sa.select(task_done).where(task_done.c.id > after).order_by(task_done.c.id).limit(BATCH)
    return fetch_sends(connection, page)


def _doubts(connection: sa.Connection, after: int) -> list[InDoubt]:
    table = task_in_doubt.c
    return fetch_doubts(
        connection, sa.select(task_in_doubt).where(table.id > after).order_by(table.id).limit(BATCH)
    )


def _shared(row: Send | InDoubt) -> dict[str, Any]:
    names = ("client_task_id", "task_type", "sender", "client", "upstream", "message_id", "size")
    found = {name: getattr(row, name) for name in (*names, "duration_ms", "data", "recipients")}
    return {"task_id": UUID(row.task_id), **found}


def _record(send: Send) -> Record:
    # A move before this one may have found it in doubt.
    return Record(**_shared(send), sent_at=send.sent_at, upstream_reply=send.upstream_reply, doubted=True)


def _doubt(each: InDoubt) -> Doubt:
    return Doubt(**_shared(each), since=each.since, reason=each.reason)
