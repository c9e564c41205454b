"""A table that is full before the first message: made by one statement, with the rows spread over 30 days.

Rules: the relay's own migrations make the tables; indexes are taken away while the rows are put in and made
again as they were, which is many times faster.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from relay.records.retention import Retention
from relay.records.store import open_store

ROWS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
INSERT INTO task_done (id, task_id, client_task_id, task_type, sender, sender_domain, client, sent_at,
                       expires_at, upstream, upstream_reply, message_id, size, duration_ms, data)
SELECT i, printf('00000000-0000-7000-8000-%012x', i), 'task-' || i, 'type-' || (i % 20),
       'sender' || (i % 1000) || '@bench.test', 'bench.test', '127.0.0.1',
       strftime('%Y-%m-%d %H:%M:%f000', 'now', '-' || ((:rows - i) * 2592000 / :rows) || ' seconds'),
       strftime('%Y-%m-%d %H:%M:%f000', 'now', '+30 days'), 'sink', '250 2.0.0 accepted',
       '<' || i || '@bench.test>', 4096, 5, '{}'
FROM n
"""
RECIPIENTS = """
INSERT INTO task_done_recipient (task_done_id, ordinal, recipient, recipient_domain, sent_at)
SELECT id, 0, 'recipient' || (id % 100000) || '@example.test', 'example.test', sent_at FROM task_done
"""


def fill(path: Path, count: int) -> None:
    """Make the relay's tables in a new file and put `count` rows in, each with one recipient."""
    asyncio.run(_migrate(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -1000000")
        indexes = database.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
        ).fetchall()
        for name, _ in indexes:
            database.execute(f"DROP INDEX {name}")
        database.execute("BEGIN")
        database.execute(ROWS, {"rows": count})
        database.execute(RECIPIENTS)
        for _, definition in indexes:
            database.execute(definition)
        database.execute("COMMIT")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def _migrate(path: Path) -> None:
    """Make the tables, and note the retention in force: else the relay would set it for all rows."""
    store = await open_store(f"sqlite:///{path}", Retention(timedelta(days=30)))
    await store.follow_retention()
    await store.close()
