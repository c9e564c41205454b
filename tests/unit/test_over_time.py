"""Counts of task types over time, beside a count of the rows themselves."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from relay.records.model import Record
from relay.records.over_time import MAX_TYPES, counts_over_time
from relay.records.queries import Queries, open_queries
from relay.records.retention import Retention
from relay.records.store import open_store

BEGIN = datetime(2026, 11, 23, tzinfo=UTC)
HOUR = timedelta(hours=1)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="a@example.com",
    client="127.0.0.1",
    sent_at=BEGIN,
    upstream="primary",
    upstream_reply="250 ok",
    size=1000,
    duration_ms=10,
    recipients=("bob@example.net", "c@example.net"),
)


@contextlib.asynccontextmanager
async def kept(url: str, rows: list[Record]) -> AsyncIterator[Queries]:
    store = await open_store(url, Retention(None))
    await store.write([replace(row, task_id=UUID(int=at + 1)) for at, row in enumerate(rows)])
    await store.close()
    queries = await open_queries(url)
    yield queries
    await queries.close()


async def test_they_are_those_of_the_rows(database: Any) -> None:
    random = Random(8)
    rows = [
        replace(
            ROW,
            task_type=random.choice(["mention", "digest", "", "Ünï", "mention2"]),
            sent_at=BEGIN + timedelta(microseconds=random.randrange(-3 * 3600, 27 * 3600) * 10**6),
        )
        for _ in range(500)
    ]
    rows += [
        replace(ROW, sent_at=BEGIN),
        replace(ROW, sent_at=BEGIN + 24 * HOUR),
    ]  # the first, and one too late
    wanted = Counter((row.task_type, (row.sent_at - BEGIN) // HOUR) for row in rows)
    async with kept(database.url, rows) as queries:
        found = await queries.over_time(BEGIN, HOUR, 24)
    assert {
        (name, slot): count for name, counts in found.items() for slot, count in enumerate(counts) if count
    } == {key: count for key, count in wanted.items() if 0 <= key[1] < 24}
    assert all(len(counts) == 24 for counts in found.values())


async def test_types_that_have_nothing_in_the_time_are_left_out(database: Any) -> None:
    rows = [ROW, replace(ROW, task_type="old", sent_at=BEGIN - HOUR)]
    async with kept(database.url, rows) as queries:
        assert list(await queries.over_time(BEGIN, HOUR, 2)) == ["mention"]


async def test_nothing_sent_is_nothing_found(database: Any) -> None:
    async with kept(database.url, []) as queries:
        assert await queries.over_time(BEGIN, HOUR, 24) == {}


async def test_types_that_somebody_makes_up_are_bounded(database: Any) -> None:
    rows = [replace(ROW, task_type=f"{at:04}") for at in range(MAX_TYPES + 50)]
    rows += [replace(ROW, task_type="order", sent_at=BEGIN + at * HOUR) for at in (-1, 0, 1, 1, 2)]
    async with kept(database.url, rows) as queries:
        found = await queries.over_time(BEGIN, HOUR, 2)
        assert len(found) == MAX_TYPES + 1
        assert found["order"] == [1, 2]  # though it stands behind all the others
        assert found[None] == [51, 0]
        assert [sum(each) for each in zip(*found.values(), strict=True)] == [MAX_TYPES + 51, 2]
        assert await queries.over_time(BEGIN + HOUR, HOUR, 1) == {"order": [2]}


@pytest.mark.parametrize("types", [1, MAX_TYPES + 1])
async def test_no_row_is_read_for_it(tmp_path: Path, types: int) -> None:
    plans: list[str] = []

    def explained(connection: sa.Connection) -> None:
        def explain(_c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
            cursor = connection.connection.cursor()
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(str(row[3]) for row in cursor.fetchall())

        sa.event.listen(connection, "before_cursor_execute", explain)
        counts_over_time(connection, BEGIN, HOUR, 2)
        sa.event.remove(connection, "before_cursor_execute", explain)

    rows = [replace(ROW, task_type=str(at)) for at in range(types)]
    async with kept(f"sqlite:///{tmp_path / 't.db'}", rows) as queries:
        await queries.reader.read(explained)
    used = [plan for plan in plans if "task_done" in plan]
    assert len(used) >= 4
    assert all("COVERING INDEX ix_task_done_" in plan for plan in used)
