"""Schema versions: brings a SQLite file to the newest one, in one transaction, with nothing for the operator.

Imported only when there is something to do: Alembic is slow to load, and most starts have nothing to do.
A new revision is a file in `versions`; its number comes at the end of `schema.SCHEMA_VERSIONS`; what an older
one says is never changed.
"""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.pool import StaticPool

__all__ = ["alembic_config", "upgrade"]

_ONE_AT_A_TIME = threading.Lock()
"""Alembic keeps what it works on in globals."""


def alembic_config() -> Config:
    """Return Alembic's configuration; it needs no alembic.ini."""
    config = Config()
    # Alembic reads options through configparser, to which "%" in a path would be an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(connection: sqlite3.Connection) -> None:
    """Bring the schema to the newest version, wholly or not at all.

    Of two processes that come at once, one waits for the other and then finds nothing to do. Raises
    `sqlite3.Error`, also when the wait for the lock takes longer than the connection's timeout.
    """
    engine = sa.create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
    config = alembic_config()
    try:
        # SQLAlchemy itself begins nothing in SQLite, but the end of this block commits what was begun, or
        # rolls it back. It also rolls back as it connects: no transaction can be begun before that.
        with _ONE_AT_A_TIME, engine.begin() as adopted:
            adopted.exec_driver_sql("BEGIN IMMEDIATE")
            config.attributes["connection"] = adopted
            command.upgrade(config, "head")
    except sa.exc.DBAPIError as error:
        raise (error.orig or error) from error
