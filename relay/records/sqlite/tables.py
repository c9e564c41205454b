"""The tables in a SQLite file: whether they are ours and of which version, and how a new file gets them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from relay.records.errors import StoreError
from relay.records.sqlite.connection import in_transaction
from relay.records.tables import COLUMNS, NAMES, SCHEMA_VERSION, SCHEMA_VERSIONS, VERSION_TABLE

__all__ = ["check_columns", "make_tables", "newest_version", "version_in"]

_SCRIPT = Path(__file__).with_name("tables.sql")
"""What the migrations come to, as a script: a test compares the two."""
_PRESENT = f"SELECT name FROM sqlite_schema WHERE name IN ({', '.join('?' * len(NAMES))})"  # noqa: S608
_NEWEST = f"SELECT max(version_num) FROM {VERSION_TABLE}"  # noqa: S608


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
    version = newest_version(raw)
    if version not in SCHEMA_VERSIONS:
        raise StoreError(
            f"{path}: has schema version {version}, and this version of the relay knows none after "
            f"{SCHEMA_VERSION}; install the newer version again"
        )
    return str(version)


def newest_version(raw: sqlite3.Connection) -> str | None:
    """Return the schema version that our tables say they have."""
    found: str | None = raw.execute(_NEWEST).fetchone()[0]
    return found


def check_columns(path: Path, raw: sqlite3.Connection) -> None:
    """Raise StoreError unless the tables have the columns that this version reads and writes."""
    for table, columns in COLUMNS.items():
        found = {row[0] for row in raw.execute("SELECT name FROM pragma_table_info(?)", (table,))}
        missing = sorted(set(columns) - found)
        if missing:
            raise StoreError(f"{path}: {table} has no column {missing[0]}; put a backup in the file's place")


def make_tables(path: Path, raw: sqlite3.Connection) -> str:
    """Make in a new file what the migrations would, all or nothing, and return the version that it then has.

    That of another process, if that was first.
    """

    def work(raw: sqlite3.Connection) -> str:
        if (version := version_in(path, raw)) is not None:
            return version
        for statement in _SCRIPT.read_text("utf-8").split(";\n"):
            raw.execute(statement)
        return SCHEMA_VERSION

    return in_transaction(raw, work)
