"""SQLAlchemy's statements on a connection of sqlite3 that is open."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, MutableMapping
from functools import cache
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import LRUCache

from relay.records.sqlite.hints import heed_hints

__all__ = ["in_transaction"]

T = TypeVar("T")

_COMPILED: MutableMapping[Any, Any] = LRUCache(200)
"""Statements that were compiled; an engine's own would go with it."""


@cache
def _dialect() -> Any:
    """What SQLAlchemy knows of SQLite; found out once, since that costs more than most reads."""
    engine = sa.create_engine("sqlite://")
    engine.connect().close()
    engine.dispose()
    return heed_hints(engine.dialect)


def in_transaction(
    raw: sqlite3.Connection, begin: str, work: Callable[[sa.Connection], T], *, undo: bool = False
) -> T:
    """Run `work` in one transaction, which `begin` begins and `undo` takes back; raises sqlite3.Error."""
    engine = sa.Engine(StaticPool(lambda: cast("Any", raw)), _dialect(), sa.URL.create("sqlite"))
    try:
        with engine.execution_options(compiled_cache=_COMPILED).connect() as connection:
            connection.exec_driver_sql(begin)
            result = work(connection)
            if undo:
                connection.rollback()
            else:
                connection.commit()
            return result
    except sa.exc.DBAPIError as error:
        raise (error.orig or error) from error
