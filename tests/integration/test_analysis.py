"""The ten questions of docs/analysis.md, asked of both databases."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from relay.records.model import Doubt, Record
from relay.records.queries import open_queries
from relay.records.retention import Retention
from relay.records.store import open_store

PAGE = (Path(__file__).parents[2] / "docs/analysis.md").read_text()
QUERIES = re.findall(r"^```sql\n(?:-- (SQLite|PostgreSQL)\n)?(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="shop@example.com",
    client="app",
    sent_at=datetime.now(UTC) - timedelta(minutes=1),
    upstream="primary",
    upstream_reply="250 ok",
    size=1000,
    duration_ms=10,
    recipients=("bob@example.net",),
    client_task_id="order 7",
    message_id="<1@example.com>",
    data={"refused": [{"recipient": "x@y", "reply": "550 no"}]},
)
DOUBT = Doubt(
    since=ROW.sent_at,
    reason="closed",
    **{name: getattr(ROW, name) for name in ("task_type", "sender", "client", "upstream", "size")},
    **{name: getattr(ROW, name) for name in ("duration_ms", "recipients", "data")},
    task_id=UUID(int=9),
)


def test_there_are_ten() -> None:
    assert sum(1 for kind, _ in QUERIES if kind != "PostgreSQL") == 10


async def test_days_and_hours_are_those_of_utc_in_every_session(database: Any) -> None:
    store = await open_store(database.url, Retention(None))
    late = replace(ROW, sent_at=datetime(2026, 11, 23, 20, 45, tzinfo=UTC))  # the next day in Kolkata
    await store.write([late, replace(late, task_id=UUID(int=2))])
    await store.close()
    kind = "SQLite" if database.url.startswith("sqlite") else "PostgreSQL"
    timed = [query for dialect, query in QUERIES if dialect == kind and re.search("AS (day|hour),", query)]

    def first(connection: sa.Connection, query: str) -> str:
        if kind == "PostgreSQL":
            connection.exec_driver_sql("SET LOCAL timezone = 'Asia/Kolkata'")
        return str(connection.exec_driver_sql(query.strip()).all()[0][0])

    queries = await open_queries(database.url)
    try:
        found = [await queries.reader.read(partial(first, query=query)) for query in timed]
    finally:
        await queries.close()
    assert [moment[:16] for moment in found] == ["2026-11-23", "2026-11-23 20:00"]


async def test_each_question_has_an_answer(database: Any) -> None:
    store = await open_store(database.url, Retention(None))
    await store.write([ROW, replace(ROW, task_id=UUID(int=2)), DOUBT])
    await store.close()
    other = "PostgreSQL" if database.url.startswith("sqlite") else "SQLite"
    queries = await open_queries(database.url)
    try:
        for query in (query for kind, query in QUERIES if kind != other):
            rows = await queries.reader.read(lambda c, sql=query: c.exec_driver_sql(sql.strip()).all())
            assert rows, query
    finally:
        await queries.close()
