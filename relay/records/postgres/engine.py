"""SQLAlchemy's statements on connections of asyncpg, and what asyncpg itself has said where they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from relay.records.postgres.database import explained

__all__ = ["cause_of", "explaining", "make_engine"]


def make_engine(connect: Callable[[], Awaitable[Any]], **options: Any) -> AsyncEngine:
    """Return an engine on connections that `connect` makes; `options` are those of SQLAlchemy."""
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, **options)


def cause_of(error: sa.exc.DBAPIError) -> Exception:
    """Return asyncpg's error, which SQLAlchemy has wrapped twice; its own where there is none."""
    cause = error.orig.__cause__ if error.orig is not None else None
    return cause if isinstance(cause, Exception) else error


@contextlib.contextmanager
def explaining(url: str) -> Iterator[None]:
    """Raise what fails on the database that `url` names as StoreError."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise explained(cause_of(error), url) from error
    except OSError as error:
        raise explained(error, url) from error
