"""What expiry costs those who wait for a commit, and how fast it works through a backlog.

    python -m bench.expiry [--rows N] [--recipients R ...] [--seconds S] [--rounds N] [--to-the-end]

Rules. For each number of recipients: a file with a backlog of expired rows with N recipients in all, then
recorder and store as the relay has them, with `--sessions` that each record a row, wait for its commit and do
something else for `--think` ms. Phases without and with expiry take turns in the one run, so that a slow
minute of the machine meets both; what is printed last are their ratios. The file of the write-ahead log is
looked at all the while. `--to-the-end`: traffic goes on until expiry has ended, however long that takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from relay.records.identity import uuid7
from relay.records.model import Record
from relay.records.recorder import Recorder
from relay.records.retention import Retention
from relay.records.spool import Spool
from relay.records.store import Store, open_store, utc_now

RETENTION = Retention(timedelta(days=30))
SENDERS = 5_000
RECIPIENTS = 300_000
BATCH_SIZE = 5000


@dataclass
class Phase:
    """What was seen in one phase. Times in seconds."""

    expiring: bool
    seconds: float = 0.0
    commits: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    expired: int = 0


class Counts:
    """The metrics of recorder and store, as far as they are wanted here."""

    def __init__(self) -> None:
        self.phase = Phase(expiring=False)
        self.errors = 0
        self.spooled = 0

    def row_recorded(self, task_type: str, /) -> None:
        pass

    def committed(self, rows: int, seconds: float, /) -> None:  # noqa: ARG002 - the recorder gives both
        self.phase.commits.append(seconds)

    def record_error(self) -> None:
        self.errors += 1

    def records_pending(self, rows: int, /) -> None:
        pass

    def records_reserve(self, octets: int, /) -> None:
        pass

    def records_spooled(self, rows: int, /) -> None:
        self.spooled = max(self.spooled, rows)

    def expired(self, rows: int) -> None:
        self.phase.expired += rows


class Traffic:
    """Sessions that record rows until they are told to stop."""

    def __init__(self, recorder: Recorder, counts: Counts, *, sessions: int, recipients: int, think: float):
        self._recorder = recorder
        self._counts = counts
        self._sessions = sessions
        self._recipients = recipients
        self._think = think
        self._stopped = False
        self.rows = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._sessions):
                group.create_task(self._session(number))

    def stop(self) -> None:
        self._stopped = True

    async def _session(self, number: int) -> None:
        count = 0
        while not self._stopped:
            record = self._record(number * 1_000_003 + count * self._recipients)
            count += 1
            phase = self._counts.phase
            began = time.perf_counter()
            await self._recorder.record(record)
            phase.waits.append(time.perf_counter() - began)
            self.rows += 1
            await asyncio.sleep(self._think)

    def _record(self, number: int) -> Record:
        task_id = uuid7()
        return Record(
            task_id=task_id,
            task_type=f"type{number % 7}",
            sender=f"sender{number % SENDERS}@s{number % 50}.example.com",
            client="127.0.0.1",
            sent_at=utc_now(),
            upstream="primary",
            upstream_reply="250 2.0.0 Ok: queued as 4F3A9B2C11",
            size=4096,
            duration_ms=12,
            recipients=tuple(
                f"user{(number * 7919 + each * 104729) % RECIPIENTS}@r{(number + each) % 900}.example.net"
                for each in range(self._recipients)
            ),
            message_id=f"<{task_id}@app.example.com>",
        )


def main() -> int:
    """Run what the arguments ask for, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000, help="recipients in the backlog")
    parser.add_argument("--recipients", type=int, nargs="+", default=[1, 100, 1000], help="of each row")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a phase")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of phases")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--think", type=float, default=4.0, help="ms between two rows of a session")
    parser.add_argument("--traffic-recipients", type=int, default=1, help="recipients of each new row")
    parser.add_argument("--to-the-end", action="store_true", help="then go on until the backlog is gone")
    parser.add_argument("--directory", type=Path, help="where files go; a real disk")
    arguments = parser.parse_args()
    failed = False
    for recipients in arguments.recipients:
        with tempfile.TemporaryDirectory(prefix="bench-expiry-", dir=arguments.directory) as scratch:
            failed = asyncio.run(_measure(Path(scratch), recipients, arguments)) or failed
    return int(failed)


async def _measure(directory: Path, recipients: int, arguments: argparse.Namespace) -> bool:
    """One backlog; return whether something was not as it must be."""
    path = directory / "task_done.db"
    rows = max(1, arguments.rows // recipients)
    began = time.monotonic()
    await make_backlog(path, rows, recipients)
    print(
        f"\n{rows:,} expired rows, {recipients} recipients each, {_mib(path):,.0f} MiB "
        f"(made in {time.monotonic() - began:.0f} s); {arguments.sessions} sessions",
        flush=True,
    )
    counts = Counts()
    store = await open_store(f"sqlite:///{path}", RETENTION)
    spool = Spool(directory / "spool")
    recorder = Recorder(
        store,
        spool,
        counts,
        commit_timeout=2.0,
        log_lost=lambda record: print(f"lost: {record.task_id}", file=sys.stderr),
    )
    recorder.start()
    traffic = Traffic(
        recorder,
        counts,
        sessions=arguments.sessions,
        recipients=arguments.traffic_recipients,
        think=arguments.think / 1e3,
    )
    log = _LogFile(path.with_name(f"{path.name}-wal"))
    running = asyncio.create_task(traffic.run())
    watching = asyncio.create_task(log.watch())
    phases = []
    counts.phase = Phase(expiring=False)
    await asyncio.sleep(min(2.0, arguments.seconds))  # warm
    for _ in range(arguments.rounds):
        for expiring in (False, True):
            phase = await _phase(store, counts, expiring=expiring, seconds=arguments.seconds)
            phases.append(phase)
            print(_line(phase), flush=True)
    if arguments.to_the_end:
        await _rest(store, counts)
    traffic.stop()
    await running
    watching.cancel()
    await asyncio.wait([watching])
    await recorder.close(10.0)
    spool.close()
    found = await store.count()
    left = await store.expire(utc_now(), BATCH_SIZE, dry_run=True)
    await store.close()
    ok = found - left == traffic.rows and not counts.errors and _sound(path)
    ok = ok and (not left if arguments.to_the_end else left <= rows - sum(phase.expired for phase in phases))
    _summary(phases)
    print(f"  write-ahead log at most {log.most / 2**20:.1f} MiB, {counts.spooled} rows spooled")
    print(
        f"  {traffic.rows:,} rows recorded, {found - left:,} found, {left:,} expired ones left: "
        f"{'ok' if ok else 'WRONG'}"
    )
    return not ok


async def _phase(store: Store, counts: Counts, *, expiring: bool, seconds: float) -> Phase:
    counts.phase = phase = Phase(expiring=expiring)
    began = time.perf_counter()
    task = None
    if expiring:
        task = asyncio.create_task(store.expire(utc_now(), BATCH_SIZE, on_batch=counts.expired))
        await asyncio.wait([task], timeout=seconds)
    else:
        await asyncio.sleep(seconds)
    phase.seconds = time.perf_counter() - began
    counts.phase = Phase(expiring=False)  # what ends between two phases is of neither
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        counts.phase = Phase(expiring=False)
        await asyncio.sleep(0.2)
    return phase


async def _rest(store: Store, counts: Counts) -> None:
    counts.phase = phase = Phase(expiring=True)
    began = time.perf_counter()
    deleted = 0
    await store.expire(utc_now(), BATCH_SIZE, on_batch=counts.expired)
    deleted = phase.expired
    phase.seconds = time.perf_counter() - began
    print(_line(phase), f"the rest: {deleted:,} rows in {phase.seconds:.0f} s", flush=True)


class _LogFile:
    """The write-ahead log's file, and the most octets that it had."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.most = 0

    async def watch(self) -> None:
        while True:
            with contextlib.suppress(FileNotFoundError):
                self.most = max(self.most, self._path.stat().st_size)
            await asyncio.sleep(0.02)


# The backlog


async def make_backlog(path: Path, rows: int, recipients: int) -> None:
    """Make the file as the relay does, and fill it with rows that expired within the last days."""
    await (await open_store(f"sqlite:///{path}", RETENTION)).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA synchronous = OFF")
        raw.execute("PRAGMA cache_size = -200000")
        indexes = raw.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL")
        definitions = indexes.fetchall()
        raw.execute("BEGIN")
        for name, _ in definitions:
            raw.execute(f"DROP INDEX {name}")
        raw.execute(_FILL, {"rows": rows, "senders": SENDERS})
        raw.execute(_FILL_RECIPIENTS, {"recipients": recipients, "pool": RECIPIENTS})
        for _, definition in definitions:
            raw.execute(definition)
        raw.execute("COMMIT")
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# A row a second or so, the last one a day ago, each expired after 30 days.
_FILL = """
    WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :rows)
    INSERT INTO task_done (
        task_id, task_type, sender, sender_domain, client, sent_at, expires_at, upstream, upstream_reply,
        message_id, size, duration_ms, data
    )
    SELECT
        printf('%08x-0000-7000-8000-%012x', n, n), 'type' || (n % 7),
        'sender' || (n * 7919 % :senders) || '@s' || (n * 7919 % 50) || '.example.com',
        's' || (n * 7919 % 50) || '.example.com', '127.0.0.1',
        strftime('%Y-%m-%d %H:%M:%f', 'now', '-31 days', '-' || ((:rows - n) / 10.0) || ' seconds') || '000',
        strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 days', '-' || ((:rows - n) / 10.0) || ' seconds') || '000',
        'primary', '250 2.0.0 Ok: queued as ' || printf('%X', n),
        '<' || n || '@app.example.com>', 4096, 12, '{}'
    FROM numbers
"""
_FILL_RECIPIENTS = """
    WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :recipients)
    INSERT INTO task_done_recipient (task_done_id, ordinal, recipient, recipient_domain, sent_at)
    SELECT
        id, n, 'user' || ((id * 7919 + n * 104729) % :pool) || '@r' || ((id + n) % 900) || '.example.net',
        'r' || ((id + n) % 900) || '.example.net', sent_at
    FROM task_done CROSS JOIN numbers
"""


# What is printed


def _line(phase: Phase) -> str:
    rate = f", {phase.expired / phase.seconds:,.0f} rows/s expired" if phase.expiring else ""
    return (
        f"  {'with' if phase.expiring else 'without':8}"
        f"{len(phase.waits) / phase.seconds:,.0f} rows/s recorded; "
        f"ms of a commit: {_figures(phase.commits)}; ms that a row waits: {_figures(phase.waits)}{rate}"
    )


def _figures(times: Sequence[float]) -> str:
    p50, p99, most = (value * 1e3 for value in _percentiles(times))
    return f"p50 {p50:.2f}, p99 {p99:.2f}, max {most:.1f}"


def _percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    if not times:
        return 0.0, 0.0, 0.0
    ordered = sorted(times)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]


def _summary(phases: Sequence[Phase]) -> None:
    """The ratios of each pair of phases, and of all: median (least - most)."""
    pairs = list(zip(phases[::2], phases[1::2], strict=True))
    for what, name in (("a commit", "commits"), ("a row's wait", "waits")):
        both = [(_percentiles(getattr(a, name)), _percentiles(getattr(b, name))) for a, b in pairs]
        ratios = [[y / x if x else 0.0 for x, y in zip(a, b, strict=True)] for a, b in both]
        shown = ", ".join(
            f"{name} {statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"
            for name, values in zip(("p50", "p99", "max"), zip(*ratios, strict=True), strict=True)
        )
        print(f"  with/without expiry, {what}: {shown}")
    rates = [len(b.waits) / b.seconds / (len(a.waits) / a.seconds) for a, b in pairs]
    print(f"  with/without expiry, rows recorded a second: {statistics.median(rates):.2f}")


def _sound(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        orphans = raw.execute(
            "SELECT count(*) FROM task_done_recipient WHERE task_done_id NOT IN (SELECT id FROM task_done)"
        ).fetchone()[0]
        return not orphans and raw.execute("PRAGMA quick_check").fetchone()[0] == "ok"


def _mib(path: Path) -> float:
    return path.stat().st_size / 2**20


if __name__ == "__main__":
    sys.exit(main())
