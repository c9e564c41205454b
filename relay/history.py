"""What became of messages in the last hour, minute by minute, kept in the process for its own page.

Rules. Nothing is counted here: the metrics' counters are looked at once a minute (and every few seconds, for
the last minute alone), so a message costs nothing. What is kept is bounded: an hour of counts that differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from relay.metrics import DURATIONS, Counts

__all__ = ["History", "Minute", "Stretch", "quantile"]

MINUTES: Final = 60
"""How many minutes are kept."""
_MINUTE_S: Final = 60.0
_STEP_S: Final = 5.0
"""How finely the last minute is known."""

_Mark = tuple[float, Mapping[str, Counts]]
"""When the counters were looked at, and where they stood."""


@dataclass(frozen=True, slots=True)
class Minute:
    """One minute of the clock: when it began (since 1970), and its transactions in the order of `Outcome`.

    `outcomes` is None for a minute of which the relay knows nothing: it did not run.
    """

    begin: float
    outcomes: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of time that ends now: its seconds, and by upstream what was counted in it."""

    seconds: float
    counts: Mapping[str, Counts]


class History:
    """The counters as they stood at each minute of the last hour; `read` gives them as they stand now."""

    def __init__(self, read: Callable[[], Mapping[str, Counts]], now: float) -> None:
        self._read = read
        self._minutes: deque[_Mark] = deque(maxlen=MINUTES + 1)
        self._steps: deque[_Mark] = deque(maxlen=int(_MINUTE_S / _STEP_S) + 1)
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._minutes.clear()
        self._steps.clear()
        self._minutes.append((now, self._read()))
        self._steps.append(self._minutes[-1])

    def look(self, now: float) -> None:
        """Look at the counters, if it is time to; every second or so. `now` is in seconds since 1970."""
        last_minute, last_step = self._minutes[-1][0], self._steps[-1][0]
        if now < last_step:  # the clock was set back
            self._begin(now)
        elif now - last_step >= _STEP_S or now // _MINUTE_S > last_minute // _MINUTE_S:
            counts = _shared(self._read(), self._steps[-1][1])
            self._steps.append((now, counts))
            if now // _MINUTE_S > last_minute // _MINUTE_S:
                self._minutes.append((now, counts))

    def minutes(self, now: float) -> list[Minute]:
        """Return the last hour, the minute that is under way last.

        A mark is made a moment after its minute has begun: what came in that moment counts for the last one.
        """
        found: dict[int, tuple[int, ...]] = {}
        marks = [*self._minutes, (now, self._read())]
        for (begin, before), (_, after) in pairwise(marks):
            found[int(begin // _MINUTE_S)] = _outcomes(before, after)
        last = int(now // _MINUTE_S)
        return [
            Minute(minute * _MINUTE_S, found.get(minute)) for minute in range(last - MINUTES + 1, last + 1)
        ]

    def last_minute(self, now: float) -> Stretch:
        """Return what was counted in the last minute, or since the start."""
        since = now - _MINUTE_S - _STEP_S
        return self._since(next((mark for mark in self._steps if mark[0] >= since), self._steps[-1]), now)

    def last_minutes(self, minutes: int, now: float) -> Stretch:
        """Return what was counted in so many minutes, or since the start."""
        since = now - (minutes + 1) * _MINUTE_S
        return self._since(next((mark for mark in self._minutes if mark[0] > since), self._minutes[-1]), now)

    def _since(self, mark: _Mark, now: float) -> Stretch:
        counted = self._read()
        return Stretch(
            max(now - mark[0], 0.0),
            {name: _less(counts, mark[1].get(name)) for name, counts in counted.items()},
        )


def quantile(answers: Sequence[int], share: float) -> float | None:
    """Return the seconds within which `share` of the answers came, as far as bounds tell; None of none."""
    total = sum(answers)
    if not total:
        return None
    wanted, seen = share * total, 0
    for at, count in enumerate(answers):
        if seen + count >= wanted and count:
            if at == len(DURATIONS):
                return DURATIONS[-1]
            low = DURATIONS[at - 1] if at else 0.0
            return low + (DURATIONS[at] - low) * (wanted - seen) / count
        seen += count
    return DURATIONS[-1]


def _outcomes(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> tuple[int, ...]:
    each = [_less(counts, before.get(name)).outcomes for name, counts in after.items()]
    return tuple(map(sum, zip(*each, strict=True)))


def _less(counts: Counts, before: Counts | None) -> Counts:
    if before is None:
        return counts
    return Counts(
        tuple(a - b for a, b in zip(counts.outcomes, before.outcomes, strict=True)),
        tuple(a - b for a, b in zip(counts.answers, before.answers, strict=True)),
    )


def _shared(counts: Mapping[str, Counts], before: Mapping[str, Counts]) -> dict[str, Counts]:
    """Return the same with objects of `before` where nothing has changed: a quiet hour takes no memory."""
    return {name: known if (known := before.get(name)) == each else each for name, each in counts.items()}
