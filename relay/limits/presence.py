"""Whether other relays use the same store: each says there that it lives.

Rules: a relay that comes says so first, and where there are others it waits until they must have seen it
before it takes any mail. One that ends says so; one that was killed counts as alive until what it said runs
out, or it is started again: it has its id again. What cannot be read changes nothing.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Protocol

from relay.limits.limits import Limits
from relay.records.errors import StoreError

__all__ = ["LOOK_S", "Presence"]

LOOK_S = 1.0
"""Seconds between two looks at who else is there."""
RENEWAL_S = 10.0
LIFE = timedelta(seconds=30)


class Store(Protocol):
    """Where it is said."""

    async def say_alive(self, name: str, until: datetime, /) -> None:
        """Say that the relay of this name lives, and will until then say so again."""

    async def say_gone(self, name: str, /) -> None:
        """Say that it has ended."""


class Counts(Protocol):
    """Where it is read."""

    async def others(self, name: str, now: datetime, /) -> int:
        """Return how many relays but the one of this name say that they live."""


class Presence:
    """One relay among those that use the store."""

    def __init__(self, store: Store, counts: Counts, limits: Limits, relay_id: str) -> None:
        self._store = store
        self._counts = counts
        self._limits = limits
        self._name = f"relay:{relay_id}"
        self._said = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Say that this relay is there; return once the others know."""
        await self._look()
        if self._limits.shared:
            await asyncio.sleep(2 * LOOK_S)
        self._task = asyncio.get_running_loop().create_task(self._live(), name="presence")

    async def stop(self, *, tell: bool) -> None:
        """End, and `tell` the others; a store that is away would only be waited for in vain."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if not tell:
            return  # it runs out
        try:
            await self._store.say_gone(self._name)
        except StoreError:
            return  # it runs out

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        now, moment = asyncio.get_running_loop().time(), datetime.now(UTC)
        try:
            if not self._said or now - self._said > RENEWAL_S:
                await self._store.say_alive(self._name, moment + LIFE)
                self._said = now
            self._limits.share(await self._counts.others(self._name, moment) > 0)
        except StoreError:
            return  # the next look is soon
