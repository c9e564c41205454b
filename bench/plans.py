"""How both databases answer what commands, page, API and rate limits ask, in a table of many rows.

    python -m bench.plans [--rows N] [--stores sqlite postgresql]

Rules: the statements are the relay's own, with their values written in; each is run twice and the second
counts. Of a plan the lines that name an index or a scan are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from bench.stores import Places, arguments_of_server, enough_room, fill
from relay.limits.rule import Rule
from relay.records import counts
from relay.records.by import By
from relay.records.search import page_of_sends
from relay.records.sends import SendFilter
from relay.records.sqlite.hints import heed_hints
from relay.records.statistics import statement_of
from tests.support import postgres

Plan = Callable[[str], tuple[float, Sequence[str]]]
"""Runs a statement; gives its milliseconds and the lines of its plan."""


def statements() -> Iterator[tuple[str, sa.Select[Any]]]:
    """Yield what is asked, by name."""
    now = datetime.now(UTC)
    for name, wanted in {
        "newest sends": SendFilter(),
        "sends by sender": SendFilter(sender="sender7@bench.test"),
        "sends by sender's domain": SendFilter(sender="@bench.test"),
        "sends by recipient": SendFilter(recipient="recipient77@example.test"),
        "sends by recipient's domain": SendFilter(recipient="@example.test"),
        "sends by type": SendFilter(task_type="type-7"),
        "sends by client": SendFilter(client="127.0.0.1"),
        "sends by Message-ID": SendFilter(message_id="<77@bench.test>"),
        "one send": SendFilter(task_id=UUID("00000000-0000-7000-8000-000000000fff")),
        "sends of an hour": SendFilter(
            since=now - timedelta(days=3), until=now - timedelta(days=3, hours=-1)
        ),
    }.items():
        yield name, page_of_sends(wanted, 50)
    day = SendFilter(since=now - timedelta(days=1))
    for by in (By.TYPE, By.SENDER, By.RECIPIENT_DOMAIN, By.HOUR):
        yield f"a day's counts by {by.value}", statement_of(day, [by], limit=1000)
    given = {"begin": now - timedelta(days=1), "rows": 100}
    for scope, key in (("sender", "sender7@bench.test"), ("recipient", "recipient77@example.test")):
        rule = Rule("bench", scope, "messages", 100, 86_400.0)  # type: ignore[arg-type]
        yield f"a limit by {scope}", counts._newest(rule).params(key=key, **given)  # noqa: SLF001


def main() -> int:
    """Make the tables, print, and return 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--stores", nargs="+", choices=("sqlite", "postgresql"), default=("sqlite",))
    arguments = parser.parse_args()
    programs = postgres.directory_of(postgres.NEWEST)
    assert programs is not None, "pip install -e '.[dev]'"
    with (
        tempfile.TemporaryDirectory(prefix="bench-plans-") as name,
        postgres.Server(programs, fsync=True, settings=arguments_of_server()) as server,
    ):
        places = Places(Path(name), server)
        for kind in arguments.stores:
            enough_room(places.directory, arguments.rows)
            url = places.url(kind)
            asyncio.run(fill(url, places, arguments.rows))
            show(kind, arguments.rows, places, url)
    return 0


def show(kind: str, rows: int, places: Places, url: str) -> None:
    """Print the plan and the time of each statement."""
    print(f"\n| {kind}, {rows:,} rows | ms | reads |\n| --- | --: | --- |", flush=True)
    dialect: Any
    if kind == "sqlite":
        dialect = heed_hints(sqlite.dialect())
        database = sqlite3.connect(url.removeprefix("sqlite:///"))
        plan = _by_sqlite(database)
    else:
        dialect = postgresql.dialect()
        plan = _by_postgres(places.server, url.rpartition("/")[2])
    for name, statement in statements():
        text = str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
        plan(text)
        took, lines = plan(text)
        read = dict.fromkeys(found for line in lines if (found := _read(line)))
        print(f"| {name} | {took:.2f} | {'; '.join(read)} |", flush=True)


def _by_sqlite(database: sqlite3.Connection) -> Plan:
    def plan(text: str) -> tuple[float, Sequence[str]]:
        with closing(database.cursor()) as cursor:
            lines = [row[3] for row in cursor.execute(f"EXPLAIN QUERY PLAN {text}")]
            begun = time.perf_counter()
            cursor.execute(text).fetchall()
            return (time.perf_counter() - begun) * 1000, lines

    return plan


def _by_postgres(server: postgres.Server, database: str) -> Plan:
    def plan(text: str) -> tuple[float, Sequence[str]]:
        lines = [
            row[0]
            for row in server.sql(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {text}", database, seconds=600)
        ]
        (took,) = (float(line.split()[2]) for line in lines if line.startswith("Execution Time"))
        return took, lines

    return plan


def _read(line: str) -> str:
    """Return which index a line of a plan reads, or which table it scans."""
    index = re.search(r"(?:INDEX |using |Bitmap Index Scan on )((?:ix_|uq_|pk_|sqlite_)?\w+)", line)
    if index is not None:
        return index[1]
    if re.search(r"PRIMARY KEY", line):
        return "primary key"
    return "the whole table" if re.search(r"Seq Scan|^SCAN (?!\(|CONSTANT|page|anon)", line) else ""


if __name__ == "__main__":
    sys.exit(main())
