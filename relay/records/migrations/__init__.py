"""Schema versions: brings a database to the newest one, in one transaction, with nothing for the operator.

Imported only when there is something to do: Alembic is slow to load, and most starts have nothing to do.
A new revision is a file in `versions`; its number comes at the end of `schema.SCHEMA_VERSIONS`; what an older
one says is never changed.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.pool import NullPool, StaticPool

__all__ = ["alembic_config", "upgrade", "upgrade_postgres"]

_ONE_AT_A_TIME = threading.Lock()
"""Alembic keeps what it works on in globals."""
_LOCK = 0x7461736B_646F6E65
"""The number of our advisory lock in the database, that none but a relay takes."""


def alembic_config() -> Config:
    """Return Alembic's configuration; it needs no alembic.ini."""
    config = Config()
    # Alembic reads options through configparser, to which "%" in a path would be an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(connection: sqlite3.Connection, version: str = "head") -> None:
    """Bring the schema to `version`, wholly or not at all.

    Of two processes that come at once, one waits for the other and then finds nothing to do. Raises
    `sqlite3.Error`, also when the wait for the lock takes longer than the connection's timeout.
    """
    engine = sa.create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
    try:
        # SQLAlchemy itself begins nothing in SQLite, but the end of this block commits what was begun, or
        # rolls it back. It also rolls back as it connects: no transaction can be begun before that.
        with _ONE_AT_A_TIME, engine.begin() as adopted:
            adopted.exec_driver_sql("BEGIN IMMEDIATE")
            _upgrade(adopted, version)
    except sa.exc.DBAPIError as error:
        raise (error.orig or error) from error


async def upgrade_postgres(connect: Callable[[], Awaitable[Any]], version: str = "head") -> None:
    """Bring the schema of a PostgreSQL database to `version`, wholly or not at all.

    `connect` makes connections to it. Of many processes that come at once, one works and the others wait for
    its lock, which ends with its transaction. Raises asyncpg's errors.
    """
    from relay.records.postgres.engine import cause_of, make_engine  # what comes with the extra alone

    engine = make_engine(connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            await asyncio.to_thread(_ONE_AT_A_TIME.acquire)
            try:
                await connection.run_sync(_upgrade, version)
            finally:
                _ONE_AT_A_TIME.release()
    except sa.exc.DBAPIError as error:
        raise cause_of(error) from error
    finally:
        await engine.dispose()


def _upgrade(connection: sa.Connection, version: str = "head") -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, version)
