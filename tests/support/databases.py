"""The databases that the store's tests run on: a SQLite file, and PostgreSQL of two major versions.

Each test gets a database of its own, looked at and changed from outside as any other program would. Values
come back as SQLite has them, times as text of fixed width, so that what is expected can be written once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from relay.records.migrations import upgrade_postgres

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from tests.support.postgres import Server

__all__ = ["Cluster", "PostgresDatabase", "SqliteDatabase", "locked"]

TEMPLATE = "relay_template"
BOUND_S = 60


class SqliteDatabase:
    """A SQLite file."""

    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        with closing(sqlite3.connect(self.path)) as raw:
            return raw.execute(query, parameters).fetchall()

    def row(self, query: str) -> dict[str, Any]:
        """Return the first row that a query finds, by the names of its columns."""
        with closing(sqlite3.connect(self.path)) as raw:
            raw.row_factory = sqlite3.Row
            return dict(raw.execute(query).fetchone())

    def execute(self, statement: str, *parameters: object) -> None:
        """Change something."""
        with closing(sqlite3.connect(self.path)) as raw:
            raw.execute(statement, parameters)
            raw.commit()


class PostgresDatabase:
    """A database in a cluster."""

    kind = "postgres"

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self.name = name
        self.url = cluster.server.url(name)

    @property
    def server(self) -> Server:
        """The server that it is on."""
        return self._cluster.server

    def __str__(self) -> str:
        return self.url

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        found = self._cluster.run(self._fetch(query, *parameters))
        return [tuple(_plain(value) for value in row) for row in found]

    def row(self, query: str) -> dict[str, Any]:
        """Return the first row that a query finds, by the names of its columns."""
        found = self._cluster.run(self._fetch(query))
        return {name: _plain(value) for name, value in found[0].items()}

    def dictionaries(self, query: str) -> list[dict[str, Any]]:
        """Return what a query finds, by the names of its columns."""
        found = self._cluster.run(self._fetch(query))
        return [{name: _plain(value) for name, value in row.items()} for row in found]

    def execute(self, statement: str, *parameters: object) -> None:
        """Change something."""
        self._cluster.run(self._fetch(statement, *parameters))

    def drop(self) -> None:
        """Remove it, whoever is connected to it."""
        self._cluster.run(self._cluster.admin(f"DROP DATABASE {self.name} WITH (FORCE)"))

    async def _fetch(self, query: str, *parameters: object) -> Any:
        numbers = itertools.count(1)
        query = "".join(f"${next(numbers)}" if part == "?" else part for part in query)
        connection = await asyncpg.connect(self.url, server_settings={"timezone": "UTC"})
        try:
            return await connection.fetch(query, *parameters)
        finally:
            await connection.close()


class Cluster:
    """A server with a template that has the tables; works from a thread and a loop of its own."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()
        self._names = itertools.count(1)
        self.run(self._make_template())

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` in the thread, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(BOUND_S)

    def database(self, *, empty: bool = False) -> PostgresDatabase:
        """Make a database with the tables of this version, or without any."""
        name = f"t{next(self._names)}"
        self.run(self.admin(f"CREATE DATABASE {name}" + ("" if empty else f" TEMPLATE {TEMPLATE}")))
        return PostgresDatabase(self, name)

    async def admin(self, statement: str) -> None:
        """Run a statement on the server's own database."""
        connection = await asyncpg.connect(self.server.url("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def _make_template(self) -> None:
        await self.admin(f"CREATE DATABASE {TEMPLATE}")
        await upgrade_postgres(lambda: asyncpg.connect(self.server.url(TEMPLATE)))


def _plain(value: object) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(" ", "microseconds")[:26]
    return str(value) if isinstance(value, UUID) else value


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold the write lock, as a backup or somebody's forgotten shell does."""
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()
