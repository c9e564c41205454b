"""How long rows are kept where several relays share a store and their files differ: the longer period wins.

Rules. Each relay says what its file says, beside its name and until when that counts, and reads what the
others say, again and again; all come to the same result, whoever comes first. One that ends takes its word
back; one that was killed is heard until its time is over, or it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Protocol

from relay.records.retention import Retention

__all__ = ["AGAIN_S", "Agreement", "Store"]

AGAIN_S = 20.0
"""Seconds between two looks at what the others say."""
LIFE = timedelta(seconds=3 * AGAIN_S)


class Store(Protocol):
    """Where it is said."""

    async def say_retention(self, name: str, value: str, until: datetime, /) -> Mapping[str, str]:
        """Say what the relay of this name wants, until then; return what the others want, by their names."""

    async def say_gone(self, name: str, /) -> None:
        """Take the word back."""


class Agreement:
    """The part of one relay. `on_differ` is told who keeps rows longer, each time that this changes."""

    def __init__(
        self,
        store: Store,
        name: str,
        own: Retention,
        *,
        clock: Callable[[], datetime],
        on_differ: Callable[[list[str]], None],
    ) -> None:
        self._store = store
        self._name = f"retention:{name}"
        self.own = own
        """What the file of this relay says."""
        self._clock = clock
        self._on_differ = on_differ
        self._told: list[str] = []

    async def reach(self) -> Retention:
        """Return what holds now; raises StoreError."""
        words = await self._store.say_retention(self._name, self.own.to_text(), self._clock() + LIFE)
        others: dict[str, Retention] = {}
        for name, text in words.items():
            try:
                others[name.removeprefix("retention:")] = Retention.of_text(text)
            except ValueError:
                continue  # of another version
        found = self.own.longest(others.values())
        longer = sorted(
            name
            for name, each in others.items()
            if self.own.longest([each]).canonical() != self.own.canonical()
        )
        if longer != self._told:
            self._told = longer
            if longer:
                self._on_differ(longer)
        return found

    async def leave(self) -> None:
        """Take the word of this relay back; raises StoreError."""
        await self._store.say_gone(self._name)
