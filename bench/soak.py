"""Sends very many messages through one relay while rows expire all the time, and says what grows.

    python -m bench.soak [--messages N] [--every S] [--directory DIR]

Rules. Sink, relay and load are processes of their own; two loads run at once, one that keeps its connections
and one with a connection for each message, with sizes from 500 octets to 1 MiB. Rows live for 5 s and are
deleted every second, and now and then somebody locks the database for longer than `commit_timeout`, so that
rows go through the spool. Every few seconds a look from outside: memory, descriptors, threads, tasks, files.
At the end all rows have expired, and the counts must agree: answered 250 = arrived at the sink = recorded =
expired, and no row is left. For each thing that was looked at there is a straight line through what was seen
after the first quarter, by least squares: its slope for 100,000 messages with the bounds of 95 %.
Exit status: 0 the counts agree, 1 they do not. Whether the lines are flat is for the reader.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.ends import OwnSink, await_greeting, free_port, said_port
from bench.processes import ROOT, running
from bench.targets import configuration

SIZES = [
    (500, 1000),
    (4096, 1000),
    (4096, 1000),
    (16 << 10, 500),
    (500, 1000),
    (128 << 10, 200),
    (1 << 20, 30),
]
"""Octets of a message, and how many of them are sent in a row."""
MORE_CONFIG = """
[retention]
default = "5s"

[expiry]
interval = "1s"
"""
LOCK_EVERY_S = 7.0
LOCKED_S = 0.8


@dataclass(frozen=True)
class Look:
    """What was seen at one moment. Sizes in MiB."""

    messages: float
    rss: float
    descriptors: float
    threads: float
    tasks: float
    log: float
    spool: float
    database: float
    rows: float


SHOWN = {
    "rss": "memory, MiB",
    "descriptors": "file descriptors",
    "threads": "threads",
    "tasks": "asyncio tasks",
    "log": "write-ahead log, MiB",
    "spool": "spool, MiB",
    "database": "database, MiB",
    "rows": "rows",
}


def main() -> int:
    """Run, print the looks and the lines, return the exit status."""
    if sys.argv[1:2] == ["--relay"]:
        return _relay(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two looks")
    parser.add_argument("--directory", type=Path, help="where files go; a real disk")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is ended here
    with tempfile.TemporaryDirectory(prefix="bench-soak-", dir=arguments.directory) as scratch:
        return _soak(Path(scratch), arguments.messages, arguments.every)


def _soak(directory: Path, messages: int, every: float) -> int:
    sink = [sys.executable, "-m", "bench.sink"]
    with running(sink, directory / "sink.log", says_port=True) as upstream:
        sink_port = said_port(upstream.process, "the sink")
        with _running_relay(directory, sink_port) as (port, http_port, process):
            looks: list[Look] = []
            began = time.monotonic()
            with _again_and_again(every, lambda: looks.append(_look(directory, http_port, process))):
                with _again_and_again(LOCK_EVERY_S, lambda: _lock(directory / "task_done.db")):
                    answered = _send(port, messages)
                seconds = time.monotonic() - began
            counts = _settled(http_port, answered)
            arrived = OwnSink(sink_port, sink_port).count()
        left = _rows(directory / "task_done.db")
    print(f"{answered:,} messages in {seconds:.0f} s, {answered / seconds:,.0f} a second")
    _print_looks(looks)
    spooled = max(look.spool for look in looks) if looks else 0.0
    print(
        f"answered 250: {answered:,}; at the sink: {arrived:,}; "
        f"rows recorded: {counts['records_total']:,.0f}; "
        f"rows expired: {counts['expired_rows_total']:,.0f}; rows left: {left}; "
        f"errors: {counts['record_errors_total']:.0f}; spool at most {spooled:.2f} MiB"
    )
    same = {answered, arrived, counts["records_total"], counts["expired_rows_total"]}
    ok = same == {messages} and left == 0 and not counts["record_errors_total"]
    print("the counts agree" if ok else "THE COUNTS DO NOT AGREE")
    return 0 if ok else 1


def _relay(tasks: Path, arguments: Sequence[str]) -> int:
    """Be the relay; on SIGUSR2 write into the file `tasks` how many asyncio tasks there are."""
    from relay.cli import main as relay

    def count(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # no loop runs yet, or no longer
            tasks.write_text(str(len(asyncio.all_tasks())), "ascii")

    signal.signal(signal.SIGUSR2, count)
    return relay(list(arguments))


@contextlib.contextmanager
def _running_relay(directory: Path, sink_port: int) -> Iterator[tuple[int, int, subprocess.Popen[str]]]:
    port, http_port = free_port(), free_port()
    config = directory / "relay.toml"
    text = configuration(directory, port, http_port, sink_port, connections=20)
    text = text.replace("[http]", 'commit_timeout = "300ms"\n\n[http]')
    config.write_text(text + MORE_CONFIG, "utf-8")
    command = [sys.executable, "-m", "bench.soak", "--relay", str(directory / "tasks")]
    log = directory / "relay.log"
    with running([*command, "serve", "--config", str(config)], log) as relay:
        await_greeting(port, relay.process, log)
        yield port, http_port, relay.process


@contextlib.contextmanager
def _again_and_again(every: float, work: Callable[[], None]) -> Iterator[None]:
    """Do `work` in a thread, at once and then every so many seconds, until the end of the block."""
    ended = threading.Event()

    def run() -> None:
        work()
        while not ended.wait(every):
            work()

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(run)
        try:
            yield
        finally:
            ended.set()
        working.result()


def _send(port: int, messages: int) -> int:
    """Send them all; return how many were answered 250."""
    share = messages // 2
    with ThreadPoolExecutor(2) as threads:
        kept = threads.submit(_send_in_turn, port, share, keep=True)
        short = threads.submit(_send_in_turn, port, messages - share, keep=False)
        return kept.result() + short.result()


def _send_in_turn(port: int, messages: int, *, keep: bool) -> int:
    answered = 0
    turn = 0
    while messages:
        size, count = SIZES[turn % len(SIZES)]
        count = min(count, messages)
        command = [sys.executable, "-m", "bench.load", "--port", str(port), "--sessions", "10"]
        command += ["--messages", str(count), "--size", str(size)] + ["--keep"] * keep
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
        answered += json.loads(done.stdout)["codes"].get("250", 0)
        messages -= count
        turn += 1
    return answered


def _lock(database: Path) -> None:
    """Hold the write lock for longer than a commit may take, as a backup does."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=5.0)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        time.sleep(LOCKED_S)
        raw.execute("ROLLBACK")


# What is looked at


def _look(directory: Path, http_port: int, process: subprocess.Popen[str]) -> Look:
    proc = Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text("ascii").splitlines())
    process.send_signal(signal.SIGUSR2)
    counts = _metrics(http_port)  # behind the signal: the loop had a turn since, and has counted its tasks
    tasks = directory / "tasks"
    database = directory / "task_done.db"
    return Look(
        messages=counts["records_total"],
        rss=int(status["VmRSS"].split()[0]) / 1024,
        descriptors=len(list((proc / "fd").iterdir())),
        threads=int(status["Threads"]),
        tasks=float(tasks.read_text("ascii") or "nan") if tasks.exists() else math.nan,
        log=_mib(database.with_name(f"{database.name}-wal")),
        spool=sum(_mib(file) for file in (directory / "spool").iterdir()),
        database=_mib(database),
        rows=counts["records_total"] - counts["expired_rows_total"],
    )


def _mib(file: Path) -> float:
    try:
        return file.stat().st_size / 2**20
    except FileNotFoundError:
        return 0.0


def _metrics(http_port: int) -> dict[str, float]:
    """Return the metrics by their bare names, all label values of one added up."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.startswith("smtp_relay_"):
            name = name.removeprefix("smtp_relay_").partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _settled(http_port: int, rows: int) -> dict[str, float]:
    """Wait, for a minute at most, until all rows have expired; return the metrics then."""
    end = time.monotonic() + 60
    while (counts := _metrics(http_port))["expired_rows_total"] < rows and time.monotonic() < end:
        time.sleep(0.5)
    return counts


def _rows(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(database)) as raw:
        return int(raw.execute("SELECT count(*) FROM task_done").fetchone()[0])


# What is printed


def _print_looks(looks: Sequence[Look]) -> None:
    print(f"{'messages':>10}" + "".join(f"{name:>13}" for name in SHOWN))
    for look in looks[:: max(1, len(looks) // 30)]:
        print(f"{look.messages:>10,.0f}" + "".join(f"{getattr(look, name):>13,.1f}" for name in SHOWN))
    later = looks[len(looks) // 4 :]
    print(f"{len(looks)} looks; of the last {len(later)}:")
    for name, title in SHOWN.items():
        points = [(look.messages, getattr(look, name)) for look in later]
        points = [point for point in points if not math.isnan(point[1])]
        if len(points) < 4:
            continue
        values = [value for _, value in points]
        slope, bound = _line(points)
        middle = statistics.median(values)
        print(
            f"  {title:22} median {middle:>10,.1f} ({min(values):,.1f} - {max(values):,.1f}), for 100,000 "
            f"messages {slope * 1e5:+,.2f} ± {bound * 1e5:,.2f}: {_verdict(slope, bound, points)}"
        )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of the line through the points, and half the width of its bounds (95 %)."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        return 0.0, 0.0
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, 2.0 * math.sqrt(rest / (len(points) - 2) / spread)


def _verdict(slope: float, bound: float, points: Sequence[tuple[float, float]]) -> str:
    """Say what the line says: nothing, or how far it moved from the first look to the last."""
    if abs(slope) <= bound:
        return "flat within its bounds"
    mean = statistics.fmean(value for _, value in points)
    moved = slope * (points[-1][0] - points[0][0]) / mean if mean else math.inf
    return f"moved by {moved:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
