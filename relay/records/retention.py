"""How long rows are kept: a value that turns a row's type and time into the time of its end. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import orjson

__all__ = ["Retention"]


@dataclass(frozen=True, slots=True)
class Retention:
    """The periods of `[retention]`: `by_type` where it names the task type, else `default`. None: never."""

    default: timedelta | None
    by_type: Mapping[str, timedelta | None] = field(default_factory=dict)

    @classmethod
    def of_seconds(cls, default: float | None, by_type: Mapping[str, float | None]) -> Retention:
        """Return the retention of a configuration, whose periods are in seconds; None: never."""
        return cls(_period(default), {name: _period(seconds) for name, seconds in by_type.items()})

    def expires_at(self, task_type: str, sent_at: datetime) -> datetime | None:
        """Return when a row of this type, sent at `sent_at`, may be deleted; None: never.

        An end beyond the calendar (year 9999) is never, too.
        """
        period = self.by_type.get(task_type, self.default)
        if period is None:
            return None
        try:
            return sent_at + period
        except OverflowError:
            return None

    def longest(self, others: Iterable[Retention]) -> Retention:
        """Return the retention that keeps every row as long as that one of these which keeps it longest."""
        all_of_them = [self, *others]
        names = {name for each in all_of_them for name in each.by_type}
        return Retention(
            _longest(each.default for each in all_of_them),
            {
                name: _longest(each.by_type.get(name, each.default) for each in all_of_them)
                for name in sorted(names)
            },
        )

    def to_text(self) -> str:
        """Return the retention in a form that `of_text` reads."""
        return orjson.dumps(
            {
                "default": _microseconds(self.default),
                "by_type": {name: _microseconds(period) for name, period in self.by_type.items()},
            }
        ).decode()

    @classmethod
    def of_text(cls, text: str) -> Retention:
        """Return what `to_text` has written; raises ValueError for anything else."""
        try:
            found = orjson.loads(text)
            return cls(
                _of_microseconds(found["default"]),
                {name: _of_microseconds(period) for name, period in found["by_type"].items()},
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"no retention: {error!r}") from error

    def canonical(self) -> str:
        """Return a text that is the same for two values exactly when they keep every row equally long."""
        named = {name: period for name, period in self.by_type.items() if period != self.default}
        return orjson.dumps(
            {
                "default": _text(self.default),
                "by_type": {name: _text(period) for name, period in named.items()},
            },
            option=orjson.OPT_SORT_KEYS,
        ).decode()


def _text(period: timedelta | None) -> str:
    return "never" if period is None else str(period)


def _longest(periods: Iterable[timedelta | None]) -> timedelta | None:
    found = list(periods)
    return None if None in found else max(period for period in found if period is not None)


def _microseconds(period: timedelta | None) -> str | None:
    return None if period is None else str(period // timedelta(microseconds=1))  # beyond what JSON counts to


def _of_microseconds(count: str | None) -> timedelta | None:
    return None if count is None else timedelta(microseconds=int(count))


def _period(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)
