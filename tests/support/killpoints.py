"""A relay that kills itself with SIGKILL where a message passes a named point.

`KILL_AT=NAME:COUNT python -m tests.support.killpoints serve --config FILE`; the process ends when the point
is passed for the COUNTth time. Without the variable it is the relay as it is.

Rules: a point changes nothing but that the process ends there. It is set where the code has a seam of its
own, and only the point that is asked for is set. What was written to a socket before a point has reached the
kernel when the process ends: event loops may keep writes to the end of their round, so such points lie behind
that.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relay.cli import main
from relay.records import spool
from relay.records.sqlite import setup, store
from relay.reply import Reply
from relay.settlement import Settlement
from relay.upstream.connection import Connection

__all__ = ["POINTS", "VARIABLE"]

VARIABLE = "KILL_AT"

Passed = Callable[[], None]


def _countdown(count: int) -> Passed:
    left = count

    def passed() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return passed


def _soon(passed: Passed) -> None:
    """Pass once what was written in this round of the loop is with the kernel."""
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, passed)


def _around(owner: Any, name: str, *, before: Passed | None = None, behind: Passed | None = None) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before()
        result = original(*arguments, **named)
        if behind is not None:
            behind()
        return result

    setattr(owner, name, wrapped)


# On the way up


def _content(passed: Passed) -> None:
    """Some content has gone up, not the end of it."""
    write = Connection.write

    def wrapped(connection: Connection, *content: bytes) -> None:
        write(connection, *content)
        if not connection._awaits_verdict:
            _soon(passed)

    Connection.write = wrapped  # type: ignore[method-assign]


def _end_of_data(passed: Passed, *, behind: bool) -> None:
    write = Connection.write

    def wrapped(connection: Connection, *content: bytes) -> None:
        ends = connection._awaits_verdict
        if ends and not behind:
            passed()
        write(connection, *content)
        if ends and behind:
            _soon(passed)

    Connection.write = wrapped  # type: ignore[method-assign]


def _journal(name: str, *, behind: bool = False) -> Callable[[Passed], None]:
    def prepare(passed: Passed) -> None:
        from relay.records import journal

        owner = journal if name == "_header" else journal.Journal
        _around(owner, name, **{"behind" if behind else "before": passed})

    return prepare


# On the way back


def _verdict(passed: Passed) -> None:
    """The verdict was read, and nothing came of it yet."""
    answer = Connection._answer

    def wrapped(connection: Connection, reply: Reply) -> bool:
        if connection._awaited[0][0] == "end_of_data":
            passed()
        return answer(connection, reply)

    Connection._answer = wrapped  # type: ignore[method-assign]


def _reply(passed: Passed, *, behind: bool) -> None:
    """The client's reply to the end of data, be it the verdict or the relay's own word."""
    tell = Settlement._tell

    def wrapped(settlement: Settlement, reply: Reply) -> None:
        if not behind:
            passed()
        tell(settlement, reply)
        if behind:
            _soon(passed)

    Settlement._tell = wrapped  # type: ignore[method-assign]


# The store


def _migration(passed: Passed) -> None:
    """Each statement that changes the schema, before it."""
    from relay.records import migrations

    upgrade = migrations.upgrade

    def wrapped(connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(lambda _: passed())
        upgrade(connection)
        connection.set_trace_callback(None)

    migrations.upgrade = wrapped


def _new_file(passed: Passed) -> None:
    """Each statement that makes the tables of a new file, before it."""
    make_tables = setup.make_tables

    def wrapped(path: Path, connection: sqlite3.Connection) -> str:
        connection.set_trace_callback(lambda _: passed())
        version = make_tables(path, connection)
        connection.set_trace_callback(None)
        return version

    setup.make_tables = wrapped


def _expiry(passed: Passed) -> None:
    """A step has deleted its rows and is not committed."""
    delete = store.delete

    def wrapped(connection: sqlite3.Connection, *arguments: Any, **named: Any) -> int:
        connection.execute("BEGIN IMMEDIATE")  # else the statement would be a transaction of its own
        found = delete(connection, *arguments, **named)
        passed()
        connection.execute("COMMIT")
        return found

    store.delete = wrapped


def _at(owner: Any, name: str, *, behind: bool = False) -> Callable[[Passed], None]:
    return lambda passed: _around(owner, name, **{"behind" if behind else "before": passed})


POINTS: dict[str, Callable[[Passed], None]] = {
    "in the content": _content,
    "before the journal": _journal("enter"),
    "in the journal": _journal("_header"),
    "before the end of data": lambda passed: _end_of_data(passed, behind=False),
    "behind the end of data": lambda passed: _end_of_data(passed, behind=True),
    "verdict read": _verdict,
    "before the commit": _at(store, "insert_entries"),
    "behind the commit": _at(store, "insert_entries", behind=True),
    "before the reply": lambda passed: _reply(passed, behind=False),
    "behind the reply": lambda passed: _reply(passed, behind=True),
    "before the journal is freed": _journal("free"),
    "behind the journal is freed": _journal("free", behind=True),
    "before the spool": _at(spool.Spool, "append"),
    "before the spool's fdatasync": _at(os, "fdatasync"),
    "behind the spool's fdatasync": _at(os, "fdatasync", behind=True),
    "before the spool forgets": _at(spool.Spool, "forget"),
    "behind the spool forgot": _at(spool.Spool, "forget", behind=True),
    "in the migration": _migration,
    "in the new file": _new_file,
    "in the expiry": _expiry,
}
"""By name: what makes the process pass the point."""


if __name__ == "__main__":
    if wanted := os.environ.get(VARIABLE):
        point, _, count = wanted.rpartition(":")
        POINTS[point](_countdown(int(count)))
    sys.exit(main())
