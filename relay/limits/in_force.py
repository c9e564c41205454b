"""The limits that a relay's settings ask for, as they are now: none, until there are some.

Rules. Once made they go on with what they have counted, whatever a reload makes of the rules; that this relay
counts, the others on the store are told before it takes any mail.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from relay.late import late
from relay.limits.configured import rules_of
from relay.limits.limits import Limits
from relay.limits.now import LimitState, limits_now
from relay.limits.presence import Presence
from relay.records.relay_id import relay_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relay.limits.rule import Aliases
    from relay.metrics import Metrics
    from relay.records.counts import StoredCounts
    from relay.records.store import Store
    from relay.settings import Settings

__all__ = ["InForce"]


class InForce:
    """The limits of one relay, with what they count by and who else does."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        metrics: Metrics,
        *,
        spooling: Callable[[], bool],
        aliases: Aliases,
    ) -> None:
        """`directory` is the spool's; `spooling` says whether rows may be durable and not in the store."""
        self._store = store
        self._directory = directory
        self._metrics = metrics
        self._spooling = spooling
        self._aliases = aliases
        self._limits: Limits | None = None
        self._counts: StoredCounts
        self._presence: Presence

    async def prepare(self, settings: Settings) -> None:
        """Have limits ready if there are to be any; nothing is limited by that."""
        if self._limits is None and settings.limits:
            identity = await asyncio.to_thread(relay_id, self._directory)
            counts_of = await late(_load)
            self._counts = counts_of(settings.records.connect_url, self._aliases)
            self._limits = Limits(
                self._counts,
                self._metrics,
                clock=time.time,
                spooling=self._spooling,
                aliases=self._aliases,
            )
            self._presence = Presence(self._store, self._counts, self._limits, identity)
            await self._presence.start()

    def use(self, settings: Settings) -> Limits | None:
        """Put the limits of the settings into force, and return them if there are any."""
        rules = rules_of(settings.limits, self._aliases)
        self._metrics.add_limits((rule.name, rule.action) for rule in rules)
        if self._limits is not None:
            self._limits.use(rules)
        return self._limits if rules else None

    async def now(self) -> list[LimitState]:
        """Return each limit, and who is near it or over it; raises StoreError."""
        if self._limits is None or not self._limits.rules:
            return []
        return await limits_now(self._counts, self._limits.rules, self._limits.clock())

    async def shown(self) -> list[dict[str, Any]]:
        """Return the same as plain values, for page and API."""
        return [limit.plain() for limit in await self.now()]

    async def close(self) -> None:
        """Count no more, and say so to the others."""
        if self._limits is not None:
            await self._presence.stop(tell=not self._spooling())
            await self._limits.close()
            await self._counts.close()


def _load() -> Callable[[str, Aliases], StoredCounts]:
    """Load SQLAlchemy, of which a relay without limits has no need."""
    from relay.records.counts import counts_of

    return counts_of
