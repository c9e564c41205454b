"""Whether an upstream that fails is worth another try now: a circuit breaker. Pure; the time is given.

Rules: closed, everything goes through. It opens after THRESHOLD failures in a row: attempts to connect
that failed, or new connections that were lost before they had answered MAIL. Open, nothing goes through until
the pause is over; then one attempt, in the background and of nobody's message, decides: it closes, or
there is another pause, up to twice as long. Pauses are drawn by lot, so that several relays do not come
back at the same moment. They begin with the shortest again once MAIL has been answered: an upstream that
takes connections and drops them is not well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from random import Random

__all__ = ["LONGEST_PAUSE", "SHORTEST_PAUSE", "THRESHOLD", "Breaker"]

THRESHOLD: Final = 3
"""Failures in a row that open it."""
SHORTEST_PAUSE: Final = 0.5
"""Seconds before the first attempt, at least; at most twice that."""
LONGEST_PAUSE: Final = 30.0
"""Seconds that a pause lasts at most."""


class Breaker:
    """The breaker of one upstream. Times are in seconds, of a clock that never goes back."""

    __slots__ = ("_lost", "_pauses", "_random", "_refused", "_retry_at", "_trying")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._refused = 0
        self._lost = 0
        self._pauses = 0
        self._retry_at: float | None = None
        self._trying = False

    @property
    def open(self) -> bool:
        """Whether the upstream is to be left alone."""
        return self._retry_at is not None

    @property
    def retry_at(self) -> float | None:
        """When the next attempt is due, while it is open."""
        return self._retry_at

    def due(self, now: float) -> bool:
        """Whether the pause is over and the attempt has not begun; after True call `try_begins`."""
        return self._retry_at is not None and not self._trying and now >= self._retry_at

    def try_begins(self) -> None:
        """The attempt that decides begins; `connected`, `refused` or `not_tried` follows."""
        self._trying = True

    def not_tried(self, now: float) -> None:
        """The attempt could not be made, for reasons of our own: another one is due after the same pause."""
        if self._trying:
            self._pauses -= 1
            self._pause(now)

    def connected(self) -> bool:
        """A connection stands; return whether that closes the breaker."""
        self._refused = 0
        if self._retry_at is None:
            return False
        self._lost = 0
        self._retry_at = None
        self._trying = False
        return True

    def refused(self, now: float, *, decisive: bool = False) -> bool:
        """An attempt to connect failed, the one that decides if `decisive`; return whether it opens now."""
        self._refused += 1
        return self._failed(now, decisive=decisive)

    def lost(self, now: float) -> bool:
        """A new connection went before it had answered MAIL; return whether the breaker opens now."""
        self._lost += 1
        return self._failed(now, decisive=False)

    def answered(self) -> None:
        """MAIL was answered: the upstream is well, as far as connections that stand go."""
        self._lost = 0
        if self._retry_at is None:
            self._pauses = 0

    def _failed(self, now: float, *, decisive: bool) -> bool:
        if self._retry_at is not None:
            if decisive:
                self._pause(now)
            return False
        if max(self._refused, self._lost) < THRESHOLD:
            return False
        self._pause(now)
        return True

    def _pause(self, now: float) -> None:
        self._trying = False
        longest = min(LONGEST_PAUSE, 2 * SHORTEST_PAUSE * 2.0 ** min(self._pauses, 16))
        self._pauses += 1
        self._retry_at = now + self._random.uniform(longest / 2, longest)

    def __repr__(self) -> str:
        state = "closed" if self._retry_at is None else "half-open" if self._trying else "open"
        return f"<Breaker {state}, {max(self._refused, self._lost)} failures>"
