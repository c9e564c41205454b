"""What happens now, and in the last hour, for page and API: from the process, not from the records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from relay import __version__
from relay.history import History, quantile
from relay.metrics import Metrics
from relay.outcome import Outcome

__all__ = ["SAMPLE_S", "Overview"]

SAMPLE_S: Final = 1.0
"""Seconds between two looks at the clock, for the history."""
LATENCY_MINUTES: Final = 15
"""The time over which latency is taken."""
_SHARES: Final = (50, 95, 99)


class Overview:
    """What the relay is doing."""

    def __init__(
        self,
        metrics: Metrics,
        readiness: Callable[[], tuple[bool, Sequence[str]]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`readiness` as for `relay.web.server.Server`; `clock` gives seconds since 1970."""
        self._metrics = metrics
        self._readiness = readiness
        self._clock = clock
        self._started = clock()
        self.history = History(metrics.counts, self._started)

    def sample(self) -> None:
        """Let the history look; every SAMPLE_S seconds."""
        self.history.look(self._clock())

    def now(self) -> dict[str, Any]:
        """Return what happens now, as values that JSON has."""
        now = self._clock()
        ready, notes = self._readiness()
        gauges = self._metrics.gauges()
        last = self.history.last_minute(now)
        finished = sum(sum(counts.outcomes) for counts in last.counts.values())
        totals = [counts.outcomes for counts in self._metrics.counts().values()]
        return {
            "version": __version__,
            "at": _iso(now),
            "started_at": _iso(self._started),
            "ready": ready,
            "notes": list(notes),
            "sessions": gauges.sessions,
            "rate_per_s": round(finished / max(last.seconds, 1.0), 2),
            "outcomes": _named(tuple(map(sum, zip(*totals, strict=True)))),
            "last_hour": self._minutes(now),
            "upstreams": self._upstreams(now),
            "records": {
                "pending": gauges.pending,
                "spooled": gauges.spooled,
                "reserve": gauges.reserve,
                "errors": gauges.record_errors,
            },
            "expiry": {
                "lag_s": round(gauges.expiry_lag, 1),
                "last_run_at": _iso(gauges.expiry_at) if gauges.expiry_at else None,
                "rows": gauges.expired_rows,
            },
        }

    def _minutes(self, now: float) -> list[dict[str, Any]]:
        """Return the outcomes of each minute that is known of, oldest first; the last is under way."""
        return [
            {"at": _iso(minute.begin), **_named(minute.outcomes)}
            for minute in self.history.minutes(now)
            if minute.outcomes is not None
        ]

    def _upstreams(self, now: float) -> list[dict[str, Any]]:
        recent = self.history.last_minutes(LATENCY_MINUTES, now).counts
        totals = self._metrics.counts()
        found = []
        for name, (idle, active, connecting) in self._metrics.gauges().connections.items():
            answers = recent[name].answers
            latency = {f"p{share}_s": _rounded(quantile(answers, share / 100)) for share in _SHARES}
            found.append(
                {
                    "name": name,
                    "connections": {"idle": idle, "active": active, "connecting": connecting},
                    "outcomes": _named(totals[name].outcomes),
                    "latency": {"answers": sum(answers), **latency},
                }
            )
        return found


def _named(outcomes: Sequence[int]) -> dict[str, int]:
    return {outcome.value: count for outcome, count in zip(Outcome, outcomes, strict=True)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
