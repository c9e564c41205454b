"""Schema versions: brings a SQLite file to the newest one, in one transaction, with nothing for the operator.

Imported only when there is something to do: Alembic is slow to load, and most starts have nothing to do.
A new revision is a file in `versions`, numbered on, with `schema.SCHEMA_VERSION` raised and nothing that an
old revision says changed.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.pool import StaticPool

__all__ = ["alembic_config", "upgrade"]


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
    `sqlite3.OperationalError` when the wait for the lock takes longer than the connection's timeout.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        engine = sa.create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
        # SQLAlchemy begins nothing of its own here: it takes part in the transaction begun above, and
        # the end of this block commits that, or rolls it back.
        with engine.begin() as adopted:
            config = alembic_config()
            config.attributes["connection"] = adopted
            command.upgrade(config, "head")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
