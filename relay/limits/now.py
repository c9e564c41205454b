"""Each limit as it stands now: who is near it, who is over it, and until when. For command, page and API.

Rules. What is shown is what the store has, so that every relay and every command shows the same; what is
under way is not in it. A read of the whole window: it may take long, and holds nobody up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol
from uuid import UUID

from relay.limits.rule import Action, Event, Rule, Scope, Unit
from relay.limits.tally import Tally

__all__ = ["NEAR", "KeyState", "LimitState", "limits_now"]

NEAR = 0.8
"""The part of its maximum from which on a key is near it."""
KEYS = 20
"""Keys of one limit that are shown, those that used most."""

_NOBODY = UUID(int=0)


class Counts(Protocol):
    """What can be asked of the store; `relay.records.counts.StoredCounts`."""

    async def look_up(self, rule: Rule, key: str, since: float, own: Collection[UUID], /) -> list[Event]:
        """Return what was sent after `since` (Unix time) and counts."""

    async def highest(self, rule: Rule, since: float, least: int, keys: int, /) -> list[tuple[str, int]]:
        """Return the keys that have used `least` or more since then, and how much, the highest first."""


@dataclass(frozen=True, slots=True)
class KeyState:
    """One key that is near its limit or over it: there is no room for one more."""

    key: str
    """Folded; empty for the null reverse-path and for `all`."""
    used: int
    state: Literal["near", "over"]
    room_in_s: float | None
    """Seconds until there is room again for one more; None: there is."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """One limit, and the keys that have used most of it, if they are near it or over it."""

    name: str
    scope: Scope
    unit: Unit
    maximum: int
    window_s: float
    action: Action
    keys: tuple[KeyState, ...]

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


async def limits_now(counts: Counts, rules: Sequence[Rule], now: float) -> list[LimitState]:
    """Return each limit as it stands at `now` (Unix time), in the order of the settings.

    Raises StoreError.
    """
    return [await _state(counts, rule, now) for rule in rules]


async def _state(counts: Counts, rule: Rule, now: float) -> LimitState:
    since = now - rule.window
    least = max(1, round(rule.maximum * NEAR))
    keys = []
    for key, used in await counts.highest(rule, since, least, KEYS):
        over = used >= rule.maximum
        room_in = await _room_in(counts, rule, key, now) if over else None
        keys.append(KeyState(key, used, "over" if over else "near", room_in))
    return LimitState(rule.name, rule.scope, rule.unit, rule.maximum, rule.window, rule.action, tuple(keys))


async def _room_in(counts: Counts, rule: Rule, key: str, now: float) -> float:
    tally = Tally(rule, key)
    tally.replace(await counts.look_up(rule, key, now - rule.window, ()), 0.0)
    return tally.wait(_NOBODY, 1, now)
