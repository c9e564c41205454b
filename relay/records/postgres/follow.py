"""Existing rows of a PostgreSQL database follow changed retention settings, in short transactions.

The row `retention` of `task_done_state` means what it means in SQLite (see `sqlite.follow`); whoever works on
it holds its lock for a step.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import orjson

from relay.records.postgres.database import Connection
from relay.records.retention import Retention
from relay.records.steps import RETENTION_ROWS, Step

__all__ = ["begin_following", "count_due", "follow", "retention_state"]


async def begin_following(connection: Connection, target: str, *, again: bool) -> bool:
    """Say that the rows are to follow `target`; return whether there is anything to do.

    `again`: some may have come behind those that follow it already.
    """
    # Of two that come to a new store at once, the second waits here for the first.
    await connection.execute(
        "INSERT INTO task_done_state (name, value) VALUES ('retention', 'null') ON CONFLICT DO NOTHING"
    )
    state = await retention_state(connection, lock=True)
    if state is not None and state["policy"] == target and not again:
        return state["done_to"] is not None
    await _keep_state(connection, target, 0, doubts_to=0)
    return True


async def follow(connection: Connection, retention: Retention, target: str) -> Step:
    """Make the next rows follow."""
    begun = time.monotonic()
    state = await retention_state(connection, lock=True)
    if state is None or state["policy"] != target or state["done_to"] is None:
        return Step(0, 0.0, finished=True)
    doubts_to = state.get("doubts_to")  # the doubts first, so that `done_to` alone says when all is done
    table, moment, done_to = (
        ("task_done", "sent_at", state["done_to"])
        if doubts_to is None
        else ("task_in_doubt", "since", doubts_to)
    )
    rows = await connection.fetch(
        f"SELECT id, task_type, {moment} AS moment, expires_at FROM {table} "  # noqa: S608
        "WHERE id > $1 ORDER BY id LIMIT $2",
        done_to,
        RETENTION_ROWS,
    )
    changes = [
        (row["id"], end)
        for row in rows
        if (end := retention.expires_at(row["task_type"], row["moment"])) != row["expires_at"]
    ]
    if changes:
        await connection.execute(
            f"UPDATE {table} SET expires_at = changed.expires_at "  # noqa: S608
            "FROM unnest($1::bigint[], $2::timestamptz[]) AS changed (id, expires_at) "
            f"WHERE {table}.id = changed.id",
            [key for key, _ in changes],
            [end for _, end in changes],
        )
    reached = None if len(rows) < RETENTION_ROWS else rows[-1]["id"]
    if doubts_to is not None:
        await _keep_state(connection, target, state["done_to"], doubts_to=reached)
        return Step(len(changes), time.monotonic() - begun, finished=False)
    await _keep_state(connection, target, reached)
    return Step(len(changes), time.monotonic() - begun, finished=reached is None)


async def count_due(connection: Connection, retention: Retention, now: datetime) -> int:
    """Count the rows that are not due by what they say, and would be by `retention`."""
    due = 0
    named = list(retention.by_type)
    kinds = [([name], False, period) for name, period in retention.by_type.items()]
    for names, others, period in (*kinds, (named, True, retention.default)):
        if period is None:
            continue
        try:
            sent_before = now - period
        except OverflowError:
            continue
        for table, moment in (("task_done", "sent_at"), ("task_in_doubt", "since")):
            condition = "<> ALL($3)" if others else "= ANY($3)"
            due += await connection.fetchval(
                f"SELECT count(*) FROM {table} WHERE {moment} <= $1 "  # noqa: S608
                f"AND (expires_at IS NULL OR expires_at > $2) AND task_type {condition}",
                sent_before,
                now,
                names,
            )
    return due


async def retention_state(connection: Connection, *, lock: bool = False) -> dict[str, Any] | None:
    """Return which settings the rows follow, and how far; None: nobody has said yet.

    `lock`: keep others out until the transaction ends.
    """
    value = await connection.fetchval(_LOCK_STATE if lock else _GET_STATE)
    state: dict[str, Any] | None = None if value is None else orjson.loads(value)
    return state


async def _keep_state(
    connection: Connection, policy: str, done_to: int | None, *, doubts_to: int | None = None
) -> None:
    value = orjson.dumps({"policy": policy, "done_to": done_to, "doubts_to": doubts_to}).decode()
    await connection.execute("UPDATE task_done_state SET value = $1 WHERE name = 'retention'", value)


_GET_STATE = "SELECT value FROM task_done_state WHERE name = 'retention'"
_LOCK_STATE = "SELECT value FROM task_done_state WHERE name = 'retention' FOR UPDATE"
