"""Makes a SQLite file ours for one writer connection: looked at first, then its pragmas, then its schema.

Rules. What is not ours is never changed: the file is read before the first pragma that would write.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

from relay.records.errors import MissingStoreError, OlderStoreError
from relay.records.sqlite.errors import is_locked
from relay.records.sqlite.tables import check_columns, make_tables, newest_version, version_in
from relay.records.tables import SCHEMA_VERSION

__all__ = ["set_up"]

_log = logging.getLogger(__name__)

JOURNAL_SIZE_LIMIT = 32 * 1024 * 1024
"""Octets that the write-ahead log keeps on disk after a checkpoint, however far a burst has stretched it."""
CHECKPOINT_PAGES = 4000
"""Pages in the write-ahead log before they are carried into the file: one written often is carried once."""
CACHE_KIB = 32 * 1024
"""Memory for pages, at most: the indexes are written all over, and the default (2 MiB) reads them again."""
RETRY_EVERY_S = 0.02


def set_up(path: Path, raw: sqlite3.Connection, busy_timeout: float, *, create: bool, upgrade: bool) -> None:
    """Look at the file, then make it ours."""
    version = version_in(path, raw)
    if version is None and not create:
        raise MissingStoreError(
            f"{path}: has no tables of the relay; nothing was recorded yet, or records.url names another file"
        )
    if version == SCHEMA_VERSION:
        check_columns(path, raw)
    elif version is not None and not upgrade:
        raise OlderStoreError(str(path), version)
    if version is None:
        # Only before the first page is written; it lets expiry give space back piece by piece.
        raw.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _write_ahead(raw, busy_timeout)
    raw.execute("PRAGMA synchronous = FULL")
    # The relay names no row that is not there, and a foreign key that is enforced costs each recipient a look
    # at its message, and within a trigger each message a look for recipients. A trigger deletes them with it.
    raw.execute("PRAGMA foreign_keys = OFF")
    # An INSERT of several rows keeps a journal of its own, so that it can be taken back alone; in a temporary
    # file it would cost more system calls than all else in a commit.
    raw.execute("PRAGMA temp_store = MEMORY")
    raw.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}")
    raw.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    raw.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    if version is None:
        version = make_tables(path, raw)
    if version != SCHEMA_VERSION:
        # Alembic takes longer to load than all the rest of a start.
        from relay.records import migrations

        _log.warning("%s: schema version %s is brought up to %s", path, version, SCHEMA_VERSION)
        migrations.upgrade(raw)
    newest_version(raw)  # the first read behind the switch makes the write-ahead log


def _write_ahead(raw: sqlite3.Connection, busy_timeout: float) -> None:
    """Switch the file to write-ahead logging, if it is not yet.

    SQLite does not wait for `busy_timeout` when another process is about to write just then (each could
    wait for the other for ever), as when two switch a new file at once, so the wait is here.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            raw.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if not is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_EVERY_S)
        else:
            return
