"""Existing rows of a SQLite file follow changed retention settings, in short transactions.

The row `retention` of `task_done_state` says which settings the rows follow, or are being made to follow, and
(`done_to`; `doubts_to` for the messages in doubt) up to which id; null: all of them. Two processes with the
same settings share the work; of two with different ones the later takes over and the other ends.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from relay.records.retention import Retention
from relay.records.steps import RETENTION_ROWS, Step
from relay.records.tables import utc_text

__all__ = ["begin_following", "count_due", "follow", "retention_state"]


def begin_following(raw: sqlite3.Connection, target: str, *, again: bool) -> bool:
    """Say that the rows are to follow `target`; return whether there is anything to do.

    `again`: some may have come behind those that follow it already.
    """
    state = retention_state(raw)
    if state is not None and state["policy"] == target and not again:
        return state["done_to"] is not None
    _keep_retention_state(raw, target, 0, doubts_to=0)
    return True


def follow(raw: sqlite3.Connection, retention: Retention, target: str) -> Step:
    """Make the next rows follow."""
    begun = time.monotonic()
    state = retention_state(raw)
    if state is None or state["policy"] != target or state["done_to"] is None:
        return Step(0, 0.0, finished=True)
    doubts_to = state.get("doubts_to")  # the doubts first, so that `done_to` alone says when all is done
    if doubts_to is not None:
        rows, changes = _following(raw, retention, _NEXT_DOUBTS, doubts_to)
        raw.executemany(_SET_DOUBT_EXPIRY, changes)
        doubts_to = None if len(rows) < RETENTION_ROWS else rows[-1][0]
        _keep_retention_state(raw, target, state["done_to"], doubts_to=doubts_to)
        return Step(len(changes), time.monotonic() - begun, finished=False)
    rows, changes = _following(raw, retention, _NEXT_ROWS, state["done_to"])
    raw.executemany(_SET_EXPIRY, changes)
    finished = len(rows) < RETENTION_ROWS
    _keep_retention_state(raw, target, None if finished else rows[-1][0])
    return Step(len(changes), time.monotonic() - begun, finished)


def _following(
    raw: sqlite3.Connection, retention: Retention, query: str, done_to: int
) -> tuple[list[Any], list[dict[str, object]]]:
    """Return the next rows, and what is to change in them."""
    rows = raw.execute(query, {"done_to": done_to, "rows": RETENTION_ROWS}).fetchall()
    changes: list[dict[str, object]] = []
    for key, task_type, sent_at, expires_at in rows:
        end = retention.expires_at(task_type, datetime.fromisoformat(sent_at).replace(tzinfo=UTC))
        wanted = None if end is None else utc_text(end)
        if wanted != expires_at:
            changes.append({"id": key, "expires_at": wanted})
    return rows, changes


def count_due(raw: sqlite3.Connection, retention: Retention, now: datetime) -> int:
    """Count the rows that are not due by what they say, and would be by `retention`."""
    named = tuple(retention.by_type)
    kinds: list[tuple[str, tuple[str, ...], timedelta | None]] = [
        ("= :t0", (name,), period) for name, period in retention.by_type.items()
    ]
    others = ", ".join(f":t{index}" for index in range(len(named)))
    kinds.append((f"NOT IN ({others})", named, retention.default))
    due = 0
    for condition, names, period in kinds:
        if period is None:
            continue
        try:
            sent_before = now - period
        except OverflowError:
            continue
        parameters = {f"t{index}": name for index, name in enumerate(names)}
        parameters |= {"sent_before": utc_text(sent_before), "now": utc_text(now)}
        for query in (_COUNT_DUE, _COUNT_DUE_DOUBTS):
            due += int(raw.execute(query + condition, parameters).fetchone()[0])
    return due


def retention_state(raw: sqlite3.Connection) -> dict[str, Any] | None:
    """Return which settings the rows follow, and how far; None: nobody has said yet."""
    row = raw.execute(_GET_RETENTION).fetchone()
    if row is None:
        return None
    state: dict[str, Any] = orjson.loads(row[0])
    return state


def _keep_retention_state(
    raw: sqlite3.Connection, policy: str, done_to: int | None, *, doubts_to: int | None = None
) -> None:
    value = orjson.dumps({"policy": policy, "done_to": done_to, "doubts_to": doubts_to}).decode()
    raw.execute(_PUT_RETENTION, {"value": value})


_COUNT_DUE = """
    SELECT count(*) FROM task_done
    WHERE sent_at <= :sent_before AND (expires_at IS NULL OR expires_at > :now) AND task_type
"""
_NEXT_ROWS = """
    SELECT id, task_type, sent_at, expires_at FROM task_done WHERE id > :done_to ORDER BY id LIMIT :rows
"""
_COUNT_DUE_DOUBTS = """
    SELECT count(*) FROM task_in_doubt
    WHERE since <= :sent_before AND (expires_at IS NULL OR expires_at > :now) AND task_type
"""
_NEXT_DOUBTS = """
    SELECT id, task_type, since, expires_at FROM task_in_doubt WHERE id > :done_to ORDER BY id LIMIT :rows
"""
_SET_DOUBT_EXPIRY = "UPDATE task_in_doubt SET expires_at = :expires_at WHERE id = :id"
_SET_EXPIRY = "UPDATE task_done SET expires_at = :expires_at WHERE id = :id"
_GET_RETENTION = "SELECT value FROM task_done_state WHERE name = 'retention'"
_PUT_RETENTION = """
    INSERT INTO task_done_state (name, value) VALUES ('retention', :value)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
