"""Which relays use a SQLite file: one row of `task_done_state` for each, good until it is renewed."""

from __future__ import annotations

import sqlite3
from datetime import datetime

from relay.records.tables import utc_text

__all__ = ["say_alive", "say_gone", "say_retention"]


def say_alive(raw: sqlite3.Connection, name: str, now: datetime, until: datetime) -> None:
    """Say that a relay lives, and clear away those that have not said so for too long."""
    raw.execute(_CLEAR, {"now": utc_text(now)})
    raw.execute(_ALIVE, {"name": name, "until": utc_text(until)})


def say_retention(
    raw: sqlite3.Connection, name: str, value: str, now: datetime, until: datetime
) -> dict[str, str]:
    """Say how long a relay wants rows kept; return what the others said that still counts, by their names."""
    raw.execute(_CLEAR_RETENTION, {"now": utc_text(now)})
    raw.execute(_SAY, {"name": name, "value": value, "until": utc_text(until)})
    return dict(raw.execute(_OTHERS, {"name": name}).fetchall())


def say_gone(raw: sqlite3.Connection, name: str) -> None:
    """Say that a relay has ended."""
    raw.execute(_GONE, {"name": name})


_CLEAR = "DELETE FROM task_done_state WHERE name LIKE 'relay:%' AND expires_at <= :now"
_ALIVE = """
    INSERT INTO task_done_state (name, value, expires_at) VALUES (:name, '', :until)
    ON CONFLICT (name) DO UPDATE SET expires_at = excluded.expires_at
"""
_GONE = "DELETE FROM task_done_state WHERE name = :name"
_CLEAR_RETENTION = "DELETE FROM task_done_state WHERE name LIKE 'retention:%' AND expires_at <= :now"
_SAY = """
    INSERT INTO task_done_state (name, value, expires_at) VALUES (:name, :value, :until)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at
"""
_OTHERS = "SELECT name, value FROM task_done_state WHERE name LIKE 'retention:%' AND name <> :name"
