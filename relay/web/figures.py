"""The data of the charts: bars on top of each other, by outcome or by task type. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from relay.outcome import Outcome

__all__ = ["SPANS", "Figure", "Series", "Span", "by_outcome", "by_type"]

_COLOURS: Final = 8
"""Task types that have a colour of their own; the others are together."""
_MINUTES: Final = 60


@dataclass(frozen=True, slots=True)
class Span:
    """So many slots of so many hours, up to now."""

    slots: int
    hours: int

    @property
    def step(self) -> timedelta:
        """The length of a slot."""
        return timedelta(hours=self.hours)

    def begin(self, now: datetime) -> datetime:
        """Return when the first slot began."""
        return self._floor(now) - (self.slots - 1) * self.step

    def _floor(self, moment: datetime) -> datetime:
        whole = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        return whole - timedelta(hours=whole.hour % self.hours)


SPANS: Final = {"24h": Span(24, 1), "7d": Span(28, 6), "30d": Span(30, 24)}
"""What can be looked at, by name."""


@dataclass(frozen=True, slots=True)
class Series:
    """One colour of a chart: a name, the name of the colour, a value for each slot (None: not known)."""

    label: str
    colour: str
    values: Sequence[int | None]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value or 0 for value in self.values)


@dataclass(frozen=True, slots=True)
class Row:
    """A slot, for the table: when it began, and a value for each series."""

    moment: datetime
    values: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart: an id in the page, a label for who cannot see it, slots and series, the lowest first."""

    id: str
    label: str
    begins: Sequence[datetime]
    step: timedelta
    series: Sequence[Series]
    problem: str | None = None

    @property
    def data(self) -> str:
        """What the page's script draws."""
        return json.dumps(
            {
                "x": [int(begin.timestamp()) for begin in self.begins],
                "step": int(self.step.total_seconds()),
                "series": [
                    {"label": each.label, "colour": each.colour, "values": each.values}
                    for each in self.series
                ],
            }
        )

    @property
    def rows(self) -> list[Row]:
        """The slots in which there was anything, the newest first."""
        columns = zip(self.begins, *(each.values for each in self.series), strict=True)
        rows = [Row(begin, values) for begin, *values in columns]
        return [row for row in reversed(rows) if any(row.values)]


def by_outcome(minutes: Iterable[Mapping[str, Any]], now: datetime) -> Figure:
    """Return the last hour; `minutes` has those that are known: begin (`at`) and outcomes."""
    last = now.astimezone(UTC).replace(second=0, microsecond=0)
    begins = [last - timedelta(minutes=back) for back in reversed(range(_MINUTES))]
    known = {datetime.fromisoformat(minute["at"]): minute for minute in minutes}
    series = [
        Series(
            outcome.value.replace("_", " "),
            outcome.value,
            [known[begin][outcome.value] if begin in known else None for begin in begins],
        )
        for outcome in Outcome
    ]
    shown = [each for each in series if each.total or each.colour == Outcome.ACCEPTED.value]
    return Figure("outcomes", "Messages of the last hour by outcome", begins, timedelta(minutes=1), shown)


def by_type(slots: Mapping[str | None, Sequence[int]], span: Span, now: datetime) -> Figure:
    """Return what was sent in a span; `slots` has how many of each task type in each slot.

    None stands for types that have no name of their own there.
    """
    begin = span.begin(now)
    totals = {name: sum(counts) for name, counts in slots.items() if name is not None}
    ordered = sorted(totals, key=lambda name: (-totals[name], name))
    own = ordered if len(ordered) <= _COLOURS else ordered[: _COLOURS - 1]
    series = [Series(name, f"series-{at}", slots[name]) for at, name in enumerate(own, 1)]
    rest = [slots[name] for name in ordered[len(own) :]]
    label = f"{len(rest)} others"
    if None in slots:
        rest.append(slots[None])
        label = "all others"
    if rest:
        series.append(Series(label, "series-other", [sum(each) for each in zip(*rest, strict=True)]))
    begins = [begin + at * span.step for at in range(span.slots)]
    return Figure("types", "Messages sent, by task type", begins, span.step, series)
