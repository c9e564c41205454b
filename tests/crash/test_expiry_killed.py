"""SIGKILL in the middle of expiry: what is left is whole, and the next start goes on."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.store import open_store
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

ROWS = 8_000


async def make_backlog(path: Path) -> None:
    store = await open_store(f"sqlite:///{path}", Retention(timedelta(days=30)))
    for start in range(0, ROWS, 500):
        await store.write(
            [
                Record(
                    task_id=UUID(int=number),
                    task_type="mention",
                    sender="a@example.com",
                    client="127.0.0.1",
                    sent_at=datetime.now(UTC) - timedelta(days=31),
                    upstream="primary",
                    upstream_reply="250 Ok",
                    size=1,
                    duration_ms=1,
                    recipients=("b@example.net", "c@example.net"),
                )
                for number in range(start, start + 500)
            ]
        )
    await store.close()


def end_lease(path: Path) -> None:
    """As if its minute were over."""
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute(
            "UPDATE task_done_state SET expires_at = '2020-01-01 00:00:00.000000' WHERE name = 'expiry'"
        )
        raw.commit()


async def test_a_kill_in_the_middle_of_expiry(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await make_backlog(relay.database)
        left = ROWS
        for _ in range(4):
            await relay.start()
            async with asyncio.timeout(30):
                while await relay.metric("expired_rows_total") < 200:
                    await asyncio.sleep(0.001)
            await relay.kill()
            rows = relay.rows("SELECT count(*) AS n FROM task_done")[0]["n"]
            assert rows < left
            left = rows
            assert relay.rows("SELECT count(*) AS n FROM task_done_recipient") == [{"n": 2 * left}]
            assert relay.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
            end_lease(relay.database)
        assert left > 0
        await relay.start()
        assert (await relay.event("expiry done", timeout_s=60))["rows"] == left
        assert await relay.metric("expiry_lag_seconds") == 0
        assert await relay.terminate() == 0
        assert relay.rows("SELECT * FROM task_done_recipient") == []
