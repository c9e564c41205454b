"""Reads a PostgreSQL database: each read a transaction that cannot write, on one moment of the database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import asyncpg
import sqlalchemy as sa

from relay.records.errors import MissingStoreError, SlowReadError, StoreError
from relay.records.postgres.database import (
    GOODBYE_TIMEOUT_S,
    STATEMENT_TIMEOUT_S,
    check,
    connect,
    explained,
    leave,
    version_in,
)
from relay.records.postgres.engine import cause_of, explaining, make_engine
from relay.records.tables import SCHEMA_VERSION
from relay.settings.dsn import shown_url

__all__ = ["PostgresReader"]

T = TypeVar("T")

POOL_SIZE = 2
MORE = 3
"""Connections that are kept open between two reads, and more of them for a moment."""


class PostgresReader:
    """A PostgreSQL database that is read; see `relay.records.queries.Reader`."""

    def __init__(self, url: str, time_limit: float | None = None) -> None:
        self._url = url
        self._time_limit = time_limit
        self._engine = make_engine(
            lambda: connect(url),
            pool_size=POOL_SIZE,
            max_overflow=MORE,
            pool_pre_ping=True,
            isolation_level="REPEATABLE READ",
        )

    @classmethod
    async def open(cls, url: str, *, time_limit: float | None = None) -> PostgresReader:
        """Return a reader of the database that `url` names; see `relay.records.queries.open_queries`."""
        connection = await connect(url)
        try:
            version = await version_in(connection, url, writes=False)
            if version is None:
                raise MissingStoreError(
                    f"{shown_url(url)}: has no tables of the relay; nothing was recorded yet, or records.url "
                    "names another database"
                )
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"{shown_url(url)}: has schema version {version}, this version of the relay reads "
                    f"{SCHEMA_VERSION}; start the relay on it once, which brings it up"
                )
            await check(connection, url)
        except Exception as error:
            raise explained(error, url) from error
        finally:
            await leave(connection)
        return cls(url, time_limit)

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in one transaction, thus on one moment."""
        limit = STATEMENT_TIMEOUT_S if self._time_limit is None else self._time_limit
        with explaining(self._url):
            try:
                async with self._engine.connect() as connection:
                    await connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(limit * 1000)}")
                    await connection.exec_driver_sql("SET TRANSACTION READ ONLY")
                    return await connection.run_sync(work)
            except sa.exc.DBAPIError as error:
                if self._time_limit is None or not isinstance(cause_of(error), asyncpg.QueryCanceledError):
                    raise
                raise SlowReadError(limit) from error

    async def close(self) -> None:
        """Close the connections that are kept open."""
        with contextlib.suppress(TimeoutError):  # cut short, it closes them all the same
            await asyncio.wait_for(self._engine.dispose(), GOODBYE_TIMEOUT_S)
