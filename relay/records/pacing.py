"""How much of long work is done at a time, and how long it rests: so that those who wait do not feel it.

Rules. Commits and long work share one connection, so a commit waits for the step that is under way: a step
is about as long as a commit, which ends with an fsync as it does. Rest is a multiple of work, so that the
share of time is bounded whatever the disk is like. Every step gets something done, so that the work ends
however many commits there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

__all__ = ["Commits", "Pace"]

STEP_S = 0.004
"""How long, in seconds, a step may take, however short commits are."""
LONGEST_STEP_S = 0.05
"""How long it may take where commits are slow."""
LEAST = 16
MOST = 512
"""Bounds of a step's work, in rows written."""
REST_ALONE = 1
REST_BESIDE_COMMITS = 3
"""Rest after a step, in multiples of its time: for other processes on the file; for our own commits."""


class Pace:
    """The pace of one run of long work. Steps begin small, and grow as they turn out short."""

    def __init__(self) -> None:
        self.work = LEAST
        """What the next step may do, in rows written."""

    def took(self, seconds: float, *, commit: float, commits: bool) -> float:
        """Learn from a step that took `seconds`; return how long to rest, in seconds.

        `commit` is what a commit takes, in seconds; `commits`: there were some beside the step.
        """
        goal = min(max(STEP_S, commit), LONGEST_STEP_S)
        if seconds > goal * 1.5:
            self.work = max(LEAST, self.work // 2)
        elif seconds < goal / 1.5:
            self.work = min(MOST, self.work * 5 // 4 + 1)
        return seconds * (REST_BESIDE_COMMITS if commits else REST_ALONE)

    def first(self, weights: Sequence[int]) -> int:
        """Return how many of the items, each of so much work, go into the next step: at least one, if any."""
        left = self.work
        for count, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return max(1, count)
        return len(weights)


class Commits:
    """What commits take, and whether there are some: who writes says so, and long work rests by it."""

    def __init__(self) -> None:
        self._count = 0
        self._seen = 0  # by long work
        self._seconds = 0.0  # what one takes, smoothed

    def took(self, seconds: float) -> None:
        """Note a commit; in whatever thread, as long as it is always that one."""
        self._count += 1
        self._seconds += (seconds - self._seconds) / 16

    async def rest(self, pace: Pace, seconds: float) -> None:
        """Rest from a step that took `seconds`, for longer if there were commits since the last rest."""
        count = self._count
        busy, self._seen = count > self._seen, count
        await asyncio.sleep(pace.took(seconds, commit=self._seconds, commits=busy))
