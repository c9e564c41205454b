"""SQLite and PostgreSQL side by side: rows, inserts into a big table, expiry beside writers, whole relays.

    python -m bench.stores [--parts rows table expiry relays] [--stores sqlite postgresql] [--table N] ...

Rules: `rows`, `table` and `expiry` measure the store alone, without the message path; `relays` sends messages
through one relay and two that share a port, by `bench.load` to `bench.sink`, and counts what arrived and what
was recorded. PostgreSQL has `fsync` on, and shares the cores with its clients. What is compared takes turns
in one run, and ratios are medians of the pairs. Tables are filled by SQL, files go when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import socket
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bench import expiry, table
from bench.cases import Case
from bench.ends import await_count, await_greeting, free_port, send, sink
from bench.errors import RunError
from bench.processes import Running, running
from bench.targets import configuration
from relay.records.identity import uuid7
from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.store import Store, open_store
from tests.support import postgres

PARTS = ("rows", "table", "expiry", "relays")
STORES = ("sqlite", "postgresql")
RETENTION = Retention(timedelta(days=30))
OCTETS_A_ROW = 1800
"""Of disk, for a row and its indexes, with what a fill needs besides."""
EXPIRY_BATCH = 5000
FILL_S = 1800.0
LOAD = Case("relays", "", sessions=20, keep=True, own_client=True)
WARM_UP = 300


@dataclass(frozen=True)
class Places:
    """Where databases are made."""

    directory: Path
    server: postgres.Server

    def url(self, kind: str) -> str:
        """Return the URL of a new database without tables."""
        if kind == "sqlite":
            return f"sqlite:///{self.directory / uuid7().hex}.db"
        return self.server.url(self.server.database())


def record() -> Record:
    """Return a row of a sender and to a recipient that the big table has, anywhere in its indexes."""
    return Record(
        task_id=uuid7(),
        task_type="mention",
        sender=f"sender{random.randrange(1000)}@bench.test",
        client="127.0.0.1",
        sent_at=datetime.now(UTC),
        upstream="primary",
        upstream_reply="250 2.0.0 Ok: queued as 4F3A",
        size=4096,
        duration_ms=12,
        recipients=(f"recipient{random.randrange(100_000)}@example.test",),
        message_id=f"<{uuid7()}@example.com>",
        data={"headers": {"Message-ID": "<x@example.com>"}},
    )


# Rows into a small table


async def write_for(store: Store, batch: int, seconds: float, commits: list[float]) -> int:
    """Write batches, one after the other; return the rows."""
    rows, end = 0, time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await store.write([record() for _ in range(batch)])
        commits.append(time.perf_counter() - began)
        rows += batch
    return rows


async def measure(name: str, url: str, batch: int, writers: int, seconds: float) -> None:
    """Print rows a second, and CPU of this process for a row."""
    stores = [await open_store(url, RETENTION, busy_timeout=30.0) for _ in range(writers)]
    await stores[0].write([record()])
    began, cpu = time.perf_counter(), time.process_time()
    rows = sum(await asyncio.gather(*(write_for(store, batch, seconds, []) for store in stores)))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    for store in stores:
        await store.close()
    print(
        f"{name:<12} {writers} writer(s), batches of {batch:>3}: {rows / took:>8.0f} rows/s, "
        f"{cpu / rows * 1e6:>5.0f} us CPU of the relay's side a row",
        flush=True,
    )


# Rows into a big table


async def measure_table(kind: str, places: Places, arguments: argparse.Namespace) -> None:
    """Print how long an insert into a table of many rows takes, beside one into an empty table."""
    rows = arguments.table
    enough_room(places.directory, rows)
    empty, full = places.url(kind), places.url(kind)
    began = time.monotonic()
    await fill(full, places, rows)
    print(f"{kind}: {rows:,} rows put in within {time.monotonic() - began:.0f} s", flush=True)
    stores = [await open_store(url, RETENTION) for url in (empty, full)]
    found: list[list[float]] = [[], []]
    for turn in range(arguments.rounds + 1):
        for store, times in zip(stores, found, strict=True):
            commits: list[float] = []
            count = await write_for(store, arguments.batch, arguments.seconds, commits)
            if turn:  # the first warms caches
                times.append(sum(commits) / count)
    for store in stores:
        await store.close()
    ratios = [b / a for a, b in zip(*found, strict=True)]
    small, big = (statistics.median(times) * 1e6 for times in found)
    print(
        f"{kind}: {small:.0f} us a row into an empty table, {big:.0f} us into one of {rows:,} rows "
        f"(batches of {arguments.batch}); ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} - {max(ratios):.2f})",
        flush=True,
    )


def enough_room(directory: Path, rows: int) -> None:
    """Raise RunError unless the disk has room for so many rows."""
    free, needed = shutil.disk_usage(directory).free, rows * OCTETS_A_ROW
    if free < needed * 1.2:
        raise RunError(f"{directory} has {free >> 20:,} MiB free, {rows:,} rows need {needed >> 20:,}")


async def fill(url: str, places: Places, rows: int, *, expired: bool = False) -> None:
    """Put rows with one recipient each into a new database; `expired`: they are due, all of them."""
    if url.startswith("sqlite"):
        path = Path(url.removeprefix("sqlite:///"))
        if expired:
            await expiry.make_backlog(path, rows, 1)
        else:
            await asyncio.to_thread(table.fill, path, rows)
        return
    store = await open_store(url, RETENTION)
    await store.follow_retention()
    await store.close()
    await asyncio.to_thread(_fill_postgres, places.server, url.rpartition("/")[2], rows, expired)


def _fill_postgres(server: postgres.Server, database: str, rows: int, expired: bool) -> None:
    """Rows first, indexes and keys afterwards, as they were: many times faster."""
    indexes = server.sql(
        "SELECT indexrelid::regclass, pg_get_indexdef(indexrelid) FROM pg_index "
        "WHERE indrelid IN ('task_done'::regclass, 'task_done_recipient'::regclass) "
        "AND NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conindid = indexrelid)",
        database,
    )
    keys = server.sql(
        "SELECT conrelid::regclass, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conrelid IN ('task_done'::regclass, 'task_done_recipient'::regclass) "
        "AND contype IN ('p', 'u', 'f') ORDER BY array_position(ARRAY['p', 'u', 'f'], contype::text)",
        database,
    )
    steps = [f"DROP INDEX {name}" for name, _ in indexes]
    steps += [f"ALTER TABLE {owner} DROP CONSTRAINT {name}" for owner, name, _ in reversed(keys)]
    age = "31 days" if expired else "0 days"
    steps += [
        "TRUNCATE task_done CASCADE",  # what is new in a transaction needs no write-ahead log, at this level
        _ROWS.format(rows=rows, age=age),
        _RECIPIENTS,
        *(f"ALTER TABLE {owner} ADD CONSTRAINT {name} {definition}" for owner, name, definition in keys),
        *(definition for _, definition in indexes),
    ]
    server.stop()
    server.start("wal_level=minimal", "max_wal_senders=0")
    server.sql("SET maintenance_work_mem = '1GB'; " + "; ".join(steps), database, seconds=FILL_S)
    server.sql("VACUUM ANALYZE", database, seconds=FILL_S)
    server.sql("CHECKPOINT", database, seconds=FILL_S)
    server.stop()
    server.start("wal_level=replica", "max_wal_senders=10")


_ROWS = """
    INSERT INTO task_done (
        task_id, client_task_id, task_type, sender, sender_domain, client, sent_at, expires_at,
        upstream, upstream_reply, message_id, size, duration_ms, data
    )
    SELECT
        ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'task-' || i, 'type-' || i % 20,
        'sender' || i % 1000 || '@bench.test', 'bench.test', '127.0.0.1', moment,
        moment + interval '30 days', 'sink', '250 2.0.0 accepted', '<' || i || '@bench.test>', 4096, 5, '{{}}'
    FROM (
        SELECT i, now() - interval '{age}' - ({rows} - i) * interval '30 days' / {rows} AS moment
        FROM generate_series(1, {rows}) AS i
    ) AS made
"""
_RECIPIENTS = """
    INSERT INTO task_done_recipient (task_done_id, ordinal, recipient, recipient_domain, sent_at)
    SELECT id, 0, 'recipient' || id % 100000 || '@example.test', 'example.test', sent_at FROM task_done
"""


# Expiry beside writers


async def measure_expiry(kind: str, places: Places, arguments: argparse.Namespace) -> None:
    """Print the 99th percentile of commit time with expiry over that without; two writers all the while."""
    rows = arguments.expired
    enough_room(places.directory, rows)
    url = places.url(kind)
    await fill(url, places, rows, expired=True)
    writers = [await open_store(url, RETENTION, busy_timeout=30.0) for _ in range(2)]
    moment, deleted = datetime.now(UTC), 0

    def count(batch: int) -> None:
        nonlocal deleted
        deleted += batch

    found: list[tuple[float, float]] = []
    for turn in range(arguments.rounds + 1):
        pair = []
        for expiring in (False, True):
            work = (
                asyncio.create_task(writers[0].expire(moment, EXPIRY_BATCH, on_batch=count))
                if expiring
                else None
            )
            commits: list[float] = []
            await asyncio.gather(*(paced(store, arguments, commits) for store in writers))
            if work is not None:
                if work.done():
                    raise RunError(
                        f"{kind}: all {rows:,} rows are gone before the end; more, or shorter phases"
                    )
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
            pair.append(sorted(commits)[len(commits) * 99 // 100])
        if turn:
            found.append((pair[0], pair[1]))
    for store in writers:
        await store.close()
    ratios = [b / a for a, b in found]
    without, beside = (statistics.median(times) * 1e3 for times in zip(*found, strict=True))
    print(
        f"{kind}: {deleted:,} of {rows:,} expired rows deleted beside two writers; p99 of a commit "
        f"{without:.2f} ms without, {beside:.2f} ms with expiry; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} - {max(ratios):.2f})",
        flush=True,
    )


async def paced(store: Store, arguments: argparse.Namespace, commits: list[float]) -> None:
    """Commit a few rows again and again, with rests, as a relay that is not at its limit does."""
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end:
        rows = [record() for _ in range(5)]
        began = time.perf_counter()
        await store.write(rows)
        commits.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)


# Whole relays


def measure_relays(kind: str, count: int, places: Places, arguments: argparse.Namespace) -> None:
    """Print messages a second and CPU of all relays for a message, through relays that share a port."""
    home = Path(tempfile.mkdtemp(dir=places.directory))
    url = places.url(kind)
    with sink(LOAD, home, postfix=False) as taking, shared_port() as port, contextlib.ExitStack() as stack:
        relays = []
        for number in range(count):
            config = relay_configuration(home / str(number), port, taking.port, url)
            log = home / f"{number}.log"
            command = [sys.executable, "-m", "relay", "serve", "--config", str(config)]
            relays.append(stack.enter_context(running(command, log)))
            await_ready(log, relays[-1])
        await_greeting(port, relays[0].process, home / "0.log")
        send(port, LOAD, WARM_UP, postfix=False)
        for each in relays:
            each.settle()
        before = [each.cpu_s() for each in relays]
        sent = send(port, LOAD, arguments.messages, postfix=False)
        ended = max(await_count(taking, WARM_UP + arguments.messages), sent.ended)
        took = ended - sent.began
        for each in relays:
            each.settle()
        used = [each.cpu_s() - first for each, first in zip(relays, before, strict=True)]
    if (kept := rows_of(url, places)) != WARM_UP + arguments.messages:
        raise RunError(f"{WARM_UP + arguments.messages} messages sent, task_done has {kept}")
    shares = " + ".join(f"{each / sum(used):.0%}" for each in used)
    print(
        f"{kind:<12} {count} relay(s): {arguments.messages / took:>6.0f} messages/s, "
        f"{sum(used) * 1e3 / arguments.messages:.2f} CPU-ms a message of the relays ({shares})",
        flush=True,
    )


@contextlib.contextmanager
def shared_port() -> Iterator[int]:
    """Hold a port that relays with `reuse_port` may take, and nobody else."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def relay_configuration(home: Path, port: int, sink_port: int, url: str) -> Path:
    """Write the configuration of one relay that shares port and store."""
    home.mkdir()
    text = configuration(home, port, free_port(), sink_port)
    text = text.replace("[server]\n", "[server]\nreuse_port = true\n")
    text = text.replace(f"sqlite:///{home}/task_done.db", url)
    config = home / "relay.toml"
    config.write_text(text, "utf-8")
    return config


def await_ready(log: Path, process: Running, seconds: float = 30.0) -> None:
    """Return once the relay has said that it started."""
    end = time.monotonic() + seconds
    while '"started"' not in log.read_text("utf-8"):
        process.check()
        if time.monotonic() > end:
            raise RunError("a relay did not start in time")
        time.sleep(0.02)


def rows_of(url: str, places: Places) -> int:
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as raw:
            return int(raw.execute("SELECT count(*) FROM task_done").fetchone()[0])
    return int(places.server.sql("SELECT count(*) FROM task_done", url.rpartition("/")[2])[0][0])


# All of it


async def run(arguments: argparse.Namespace, places: Places) -> None:
    """Measure what is asked for."""
    for kind in arguments.stores if "rows" in arguments.parts else ():
        url = places.url(kind)
        for writers in (1, 2):
            for batch in (1, 50, 500):
                await measure(kind, url, batch, writers, arguments.seconds)
    if "relays" in arguments.parts:
        for _ in range(arguments.rounds):
            for kind in arguments.stores:
                for count in (1, 2):
                    await asyncio.to_thread(measure_relays, kind, count, places, arguments)
    for kind in arguments.stores if "expiry" in arguments.parts else ():
        await measure_expiry(kind, places, arguments)
    for kind in arguments.stores if "table" in arguments.parts else ():
        await measure_table(kind, places, arguments)


def main(words: Sequence[str] | None = None) -> int:
    """Read the arguments, measure, clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--table", type=int, default=200_000, help="rows of the big table")
    parser.add_argument("--expired", type=int, default=1_000_000, help="expired rows beside writers")
    parser.add_argument("--messages", type=int, default=4000, help="through the relays")
    parser.add_argument("--batch", type=int, default=50, help="rows of a commit into the big table")
    parser.add_argument("--rounds", type=int, default=3, help="pairs that a ratio is the median of")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one phase")
    parser.add_argument("--directory", type=Path, help="where SQLite's files go; a real disk")
    arguments = parser.parse_args(words)
    programs = postgres.directory_of(postgres.NEWEST)
    if programs is None:
        print("PostgreSQL is not installed: pip install -e '.[dev]'", file=sys.stderr)
        return 1
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-stores-", dir=arguments.directory) as name,
            postgres.Server(programs, fsync=True, settings=arguments_of_server()) as server,
        ):
            asyncio.run(run(arguments, Places(Path(name), server)))
    except RunError as error:
        print(f"does not count: {error}", file=sys.stderr)
        return 1
    return 0


def arguments_of_server() -> list[str]:
    """What an operator would set: room for the indexes that are in use, and log files that are not tiny."""
    return ["shared_buffers=1GB", "max_wal_size=8GB"]


if __name__ == "__main__":
    sys.exit(main())
