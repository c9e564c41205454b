"""What sqlite3's errors mean for the operator: each a `StoreError` of one line."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from relay.records.errors import RejectedRecordError, StoreError

__all__ = ["NOT_A_DATABASE", "explained", "is_locked"]

NOT_A_DATABASE = "is not a SQLite database; it was left alone, name another file in records.url"

_DATA_ERRORS = frozenset(
    {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE}
)
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def explained(error: sqlite3.Error, path: Path, busy_timeout: float) -> StoreError:
    """Say in one line what sqlite3's error means for the operator."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # found by the sqlite3 module, not by SQLite: a value that has no place in a column
        return RejectedRecordError(f"{path}: {error}")
    primary = code & 0xFF
    if primary in _DATA_ERRORS:
        return RejectedRecordError(f"{path}: {error}")
    if primary in _LOCKED:
        return StoreError(
            f"{path}: locked by another process for more than {busy_timeout:g} s; "
            "find what holds it open (fuser) and end that"
        )
    return StoreError(f"{path}: {_ADVICE.get(primary, error)} ({error.sqlite_errorname})")


_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full; make room",
    sqlite3.SQLITE_IOERR: "reading or writing failed; look at the disk and the system's log",
    sqlite3.SQLITE_READONLY: "cannot be written; give the relay's user the file and its directory",
    sqlite3.SQLITE_PERM: "access is refused; give the relay's user the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; give the relay's user the file and its directory",
    sqlite3.SQLITE_CORRUPT: "is damaged; move it away, or put a backup in its place",
    sqlite3.SQLITE_NOTADB: NOT_A_DATABASE,
}


def is_locked(error: sqlite3.Error) -> bool:
    """Whether another connection is in the way, for now."""
    return error.sqlite_errorcode & 0xFF in _LOCKED
