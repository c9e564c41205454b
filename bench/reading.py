"""Every answer of the page and the API over a full table, beside the bare query that finds the same rows.

    python -m bench.reading [--rows N] [--times N]

Rules: one relay process on a SQLite file of its own, asked over one HTTP connection at a time. "Bare" is the
shortest SQL for the same question, along the index that serves it, on a connection of its own that is warm.
The first answer is shown as well as the median: what the page has read of the records rests for a while.
"""

from __future__ import annotations

import argparse
import http.client
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from bench.ends import await_greeting, free_port
from bench.processes import running
from bench.table import fill
from bench.targets import configuration

NEWEST = "SELECT * FROM task_done ORDER BY sent_at DESC, id DESC LIMIT 50"
SENDER = (
    "SELECT * FROM task_done WHERE lower(sender) = 'sender7@bench.test' "
    "ORDER BY sent_at DESC, id DESC LIMIT 50"
)
RECIPIENT = (
    "SELECT * FROM task_done_recipient WHERE lower(recipient) = 'recipient77@example.test' "
    "ORDER BY sent_at DESC LIMIT 50"
)
ONE = "SELECT * FROM task_done WHERE task_id = '00000000-0000-7000-8000-000000000fff'"
DOUBTS = "SELECT * FROM task_in_doubt ORDER BY since DESC LIMIT 50"
WEEK = "sent_at >= strftime('%Y-%m-%d %H:%M:%f000', 'now', '-7 days')"
DAY = "sent_at >= strftime('%Y-%m-%d %H:%M:%f000', 'now', '-1 day')"

ANSWERS = {
    "/": NEWEST,
    "/live": NEWEST,
    "/sends": NEWEST,
    "/sends?q=sender7@bench.test": SENDER,
    "/sends?q=to:recipient77@example.test": RECIPIENT,
    "/sends/00000000-0000-7000-8000-000000000fff": ONE,
    "/in-doubt": DOUBTS,
    "/api/sends": NEWEST,
    "/api/sends?sender=sender7@bench.test": SENDER,
    "/api/sends?recipient=recipient77@example.test": RECIPIENT,
    "/api/sends/00000000-0000-7000-8000-000000000fff": ONE,
    "/api/in-doubt": DOUBTS,
    "/api/stats?by=type&since=7d": f"SELECT task_type, count(*) FROM task_done WHERE {WEEK} GROUP BY 1",
    "/api/stats?by=upstream&since=7d": f"SELECT upstream, count(*) FROM task_done WHERE {WEEK} GROUP BY 1",
    "/api/stats?by=sender&since=1d": f"SELECT lower(sender), count(*) FROM task_done WHERE {DAY} GROUP BY 1",
    "/api/stats?by=client&since=7d": f"SELECT client, count(*) FROM task_done WHERE {WEEK} GROUP BY 1",
    "/api/stats?by=recipient-domain&since=7d": (
        f"SELECT recipient_domain, count(*) FROM task_done_recipient WHERE {WEEK} GROUP BY recipient_domain"
    ),
    "/api/stats?by=hour&since=7d": (
        f"SELECT substr(sent_at, 1, 13), count(*) FROM task_done WHERE {WEEK} GROUP BY 1"
    ),
    "/api/stats?by=day": "SELECT substr(sent_at, 1, 10), count(*) FROM task_done GROUP BY 1",
    "/api/limits": "SELECT 1",
    "/api/status": "SELECT 1",
}
"""What is asked, and the bare query."""


def main() -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=7, help="each is asked so often")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        port, http_port = free_port(), free_port()
        config = directory / "relay.toml"
        config.write_text(configuration(directory, port, http_port, 1), "utf-8")
        file = directory / "task_done.db"
        fill(file, arguments.rows)
        log = directory / "relay.log"
        command = [sys.executable, "-m", "relay", "serve", "--config", str(config)]
        with running(command, log) as relay:
            await_greeting(port, relay.process, log)
            print(f"{arguments.rows} rows, medians of {arguments.times}, milliseconds\n")
            print("| answer | first | median | bare query | ratio |\n| --- | --: | --: | --: | --: |")
            for address, query in ANSWERS.items():
                bare = statistics.median(_times(_ask_file(file, query), arguments.times))
                first, *others = _times(_ask_relay(http_port, address), arguments.times)
                middle = statistics.median(others)
                print(
                    f"| `{address}` | {first:.1f} | {middle:.1f} | {bare:.2f} | {middle / bare:.1f} |",
                    flush=True,
                )
    return 0


def _times(ask: Callable[[], None], times: int) -> list[float]:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        ask()
        found.append((time.perf_counter() - begun) * 1000)
    return found


def _ask_file(file: Path, query: str) -> Callable[[], None]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        database.execute(query).fetchall()  # the pages are in memory from here on
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)

    def ask() -> None:
        database.execute(query).fetchall()

    return ask


def _ask_relay(port: int, address: str) -> Callable[[], None]:
    def ask() -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", address)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise SystemExit(f"{address}: {answer.status} {body[:300]!r}")

    return ask


if __name__ == "__main__":
    sys.exit(main())
