"""Series of numbers that a scrape reads: plain ones of our own, which only the event loop's thread moves.

The Prometheus library writes the scrapes; its own instruments lock for every number that they move.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import inf
from typing import Any, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["Histogram", "Number", "Series"]


class Number:
    """One series of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def sample(self) -> tuple[float]:
        """Return what the family's `add_metric` takes."""
        return (self.value,)


class Histogram:
    """One series of a histogram: how many values each bucket got (the last has no bound), and their sum."""

    __slots__ = ("_bounds", "_counts", "_fresh", "observe", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._fresh: list[float] = []
        self.observe: Callable[[float], None] = self._fresh.append
        """Note a value, to be counted when `settle` is called."""
        self.sum: float = 0

    def settle(self) -> None:
        """Count the values that were noted."""
        if self._fresh:
            self.count(sorted(self._fresh))
            self._fresh.clear()

    def count(self, values: Sequence[float]) -> None:
        """Count values, which are sorted: then one search finds the end of each bucket."""
        self.sum += sum(values)
        # To the right of equal ones: a bound is in the bucket that it ends.
        ends = [0, *(bisect_right(values, bound) for bound in self._bounds), len(values)]
        self._counts = [
            count + end - begin for count, (begin, end) in zip(self._counts, pairwise(ends), strict=True)
        ]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many values each bucket got, the last without a bound."""
        return tuple(self._counts)

    def sample(self) -> tuple[list[tuple[str, int]], float]:
        """Return what the family's `add_metric` takes: the buckets, cumulative, and the sum."""
        limits = map(floatToGoString, (*self._bounds, inf))
        return list(zip(limits, accumulate(self._counts), strict=True)), self.sum


_Kind = TypeVar("_Kind", Number, Histogram)


class Series(Collector):
    """Series, by family and label values, both in the order in which they were made."""

    def __init__(self, *, before_scrape: Callable[[], None]) -> None:
        self._before_scrape = before_scrape
        self._histograms: list[Histogram] = []
        self._families: dict[str, tuple[Callable[[], Any], dict[tuple[str, ...], Any]]] = {}

    def counter(self, name: str, text: str, **labels: str) -> Number:
        """Return a counter's series, the one that there is if these labels have one; so with all kinds."""
        return self._add(CounterMetricFamily, name, text, labels, Number())

    def gauge(self, name: str, text: str, **labels: str) -> Number:
        """Return a gauge's series."""
        return self._add(GaugeMetricFamily, name, text, labels, Number())

    def unknown(self, name: str, text: str, **labels: str) -> Number:
        """Return the series of a family of unknown type."""
        return self._add(UnknownMetricFamily, name, text, labels, Number())

    def histogram(self, name: str, text: str, bounds: Sequence[float], **labels: str) -> Histogram:
        """Return a histogram's series; `bounds` are the upper ends of its buckets but the last."""
        series = self._add(HistogramMetricFamily, name, text, labels, Histogram(bounds))
        self._histograms.append(series)
        return series

    def remove(self, name: str) -> None:
        """Have a family no more, if there was one."""
        self._families.pop(name, None)

    def settle(self) -> None:
        """Have every histogram count what it has noted."""
        for histogram in self._histograms:
            histogram.settle()

    def _add(
        self, kind: Callable[..., Metric], name: str, text: str, labels: Mapping[str, str], new: _Kind
    ) -> _Kind:
        family = partial(kind, f"smtp_relay_{name}", text, labels=tuple(labels))
        _, members = self._families.setdefault(name, (family, {}))
        series: _Kind = members.setdefault(tuple(labels.values()), new)  # `other` may be configured, too
        return series

    def collect(self) -> Iterable[Metric]:
        """Give the families, as the library asks at each scrape."""
        self._before_scrape()
        for new_family, members in self._families.values():
            family = new_family()
            for values, series in members.items():
                family.add_metric(values, *series.sample())
            yield family
