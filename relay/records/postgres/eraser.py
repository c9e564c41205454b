"""Changes a PostgreSQL database as a command does, beside the relays that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from relay.records.postgres.database import connect
from relay.records.postgres.engine import explaining, make_engine

__all__ = ["PostgresEraser"]

T = TypeVar("T")


class PostgresEraser:
    """A PostgreSQL database that is changed; see `relay.records.forgetting.Eraser`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine = make_engine(lambda: connect(url), poolclass=NullPool)

    async def write(self, work: Callable[[sa.Connection], T], *, undo: bool) -> T:
        """Run `work` in one transaction, which `undo` takes back."""
        with explaining(self._url):
            async with self._engine.connect() as connection:
                result = await connection.run_sync(work)
                if undo:
                    await connection.rollback()
                else:
                    await connection.commit()
                return result

    async def close(self) -> None:
        """Close what is open. What was erased leaves the files with the next vacuum."""
        await self._engine.dispose()
