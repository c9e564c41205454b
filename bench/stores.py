"""Rows into SQLite and PostgreSQL side by side: alone, in batches, from two writers, and beside many rows.

`python -m bench.stores [--rows N]` prints a table. The store alone is measured, without the message path;
PostgreSQL has `fsync` on, and shares the cores with its clients.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from relay.records.identity import uuid7
from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.store import Store, open_store
from tests.support import postgres

RETENTION = Retention(timedelta(days=30))
SECONDS = 2.0


def record() -> Record:
    return Record(
        task_id=uuid7(),
        task_type="mention",
        sender="alice@example.com",
        client="127.0.0.1",
        sent_at=datetime.now(UTC),
        upstream="primary",
        upstream_reply="250 2.0.0 Ok: queued as 4F3A",
        size=4096,
        duration_ms=12,
        recipients=("bob@example.net",),
        message_id=f"<{uuid7()}@example.com>",
        data={"headers": {"Message-ID": "<x@example.com>"}},
    )


async def write_for(store: Store, batch: int, seconds: float) -> int:
    """Write batches, one after the other; return the rows."""
    rows, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        await store.write([record() for _ in range(batch)])
        rows += batch
    return rows


async def measure(name: str, url: str, batch: int, writers: int) -> float:
    """Print rows a second and CPU of this process for a row; return the former."""
    stores = [await open_store(url, RETENTION, busy_timeout=30.0) for _ in range(writers)]
    await stores[0].write([record()])
    began, cpu = time.perf_counter(), time.process_time()
    rows = sum(await asyncio.gather(*(write_for(store, batch, SECONDS) for store in stores)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    for store in stores:
        await store.close()
    print(
        f"{name:<12} {writers} writer(s), batches of {batch:>3}: {rows / seconds:>8.0f} rows/s, "
        f"{cpu / rows * 1e6:>5.0f} us CPU of the relay's side a row",
        flush=True,
    )
    return rows / seconds


async def fill(url: str, rows: int) -> None:
    store = await open_store(url, RETENTION)
    for _ in range(rows // 500):
        await store.write([record() for _ in range(500)])
    await store.close()


async def main(rows: int) -> None:
    programs = postgres.directory_of(postgres.NEWEST)
    assert programs is not None
    with tempfile.TemporaryDirectory() as name, postgres.Server(programs, fsync=True) as server:
        urls = {
            "sqlite": f"sqlite:///{Path(name) / 'rows.db'}",
            "postgresql": server.url(server.database()),
        }
        for kind, url in urls.items():
            for writers in (1, 2):
                for batch in (1, 50, 500):
                    await measure(kind, url, batch, writers)
        for kind, url in urls.items():
            before = await measure(f"{kind}, few", url, 50, 1)
            await fill(url, rows)
            after = await measure(f"{kind}, many", url, 50, 1)
            print(
                f"{kind}: {rows} more rows in the table: {after / before:.2f} of the rows a second",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    asyncio.run(main(parser.parse_args().rows))
