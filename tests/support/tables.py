"""What the migrations make of an empty SQLite file, as a script: `relay/records/sqlite/tables.sql`.

After a new revision: python -m tests.support.tables > relay/records/sqlite/tables.sql
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

from relay.records.migrations import upgrade
from relay.records.tables import VERSION_TABLE

__all__ = ["definitions", "script"]


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
