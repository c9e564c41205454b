"""How many connections to one upstream may be open at once. Pure; the time is given.

Rules: as many as the settings say, until the upstream turns one away while others stand: then as many as
stood. After PAUSE seconds one more is tried. Each that stands is followed by another one at once, up to
what the settings say; one that is turned away, by the next PAUSE. So an upstream that is full hears of
one connection too many in PAUSE seconds, however many messages wait.
"""

from __future__ import annotations

from typing import Final

__all__ = ["PAUSE", "Allowance"]

PAUSE: Final = 10.0
"""Seconds after which an upstream that was full is asked for one more connection."""


class Allowance:
    """What one upstream allows."""

    __slots__ = ("_most", "_one_more", "_told", "_try_at", "limit")

    def __init__(self, most: int) -> None:
        """`most` is what the settings say."""
        self._most = most
        self.limit = most
        """How many connections the upstream is known to take, `most` while it has turned none away."""
        self._told = most
        self._one_more = False
        self._try_at = 0.0

    @property
    def reduced(self) -> bool:
        """Whether the upstream takes fewer than the settings say."""
        return self.limit < self._most

    def room(self, used: int) -> bool:
        """Whether one more may be opened beside `used`."""
        return used < self.limit + self._one_more

    def turned_away(self, standing: int, now: float) -> None:
        """The upstream took no more than these, at least one."""
        self.limit = standing
        self._one_more = False
        self._try_at = now + PAUSE

    def opened(self, standing: int) -> None:
        """A connection was taken; so many stand now."""
        if standing > self.limit:
            self.limit = self._told = standing
            self._one_more = self.reduced

    def sweep(self, now: float) -> bool:
        """Allow one more after the pause; return whether it is news that there may be so few."""
        if self.reduced and now >= self._try_at:
            self._one_more = True
        news = self.limit < self._told
        self._told = self.limit
        return news

    def __repr__(self) -> str:
        return f"<Allowance {self.limit} of {self._most}>"
