"""What the migrations make of an empty SQLite file, as a script: `relay/records/sqlite/tables.sql`.

After a new revision: python -m tests.support.tables > relay/records/sqlite/tables.sql
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

from relay.records.migrations import upgrade
from relay.records.tables import VERSION_TABLE

__all__ = ["BACK_TO_0001", "definitions", "script"]

BACK_TO_0001 = f"""
    DROP TRIGGER task_done_with_its_recipients;
    DROP VIEW task_done_by_hour;
    DROP VIEW task_done_by_type;
    DROP VIEW task_done_by_sender;
    DROP VIEW task_done_by_recipient_domain;
    DROP INDEX ix_task_done_sent_at;
    DROP TABLE IF EXISTS task_in_doubt;
    UPDATE {VERSION_TABLE} SET version_num = '0001';
"""
"""Undoes what came after the first schema, as if an older relay had written the file."""


def definitions(raw: sqlite3.Connection) -> list[str]:
    """Return how all there is was defined, in the order in which it was made, without space at line ends."""
    rows = raw.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")
    return [re.sub(r"\s*\n", "\n", sql).strip() for (sql,) in rows]


def script() -> str:
    """Return the script."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw)
        (version,) = raw.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
        statements = [*definitions(raw), f"INSERT INTO {VERSION_TABLE} VALUES ('{version}')"]
        return "".join(f"{statement};\n" for statement in statements)


if __name__ == "__main__":
    print(script(), end="")
