"""One count: what the store has of one key within the window, and what this relay knows beside it. No I/O.

Rules:
- What counts is at any time in one place: `held` while it is under way, an event once it was sent. An event
  of this relay that the store may not have yet is `unsettled`, and stays when the store's rows come in.
- The store's rows carry their task ids; one that is held or unsettled here is not counted twice.
- An event counts while it is younger than the window. What comes late, or by another clock, is put in its
  place.
- A long list of events is made shorter by taking neighbours together at the time of the younger one: the
  count is then never too small.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from uuid import UUID

from relay.limits.rule import Event, Rule

__all__ = ["MAX_EVENTS", "Tally"]

MAX_EVENTS = 10_000
"""Events of one count; more are taken together."""


class Tally:
    """The count of one key under one rule."""

    __slots__ = ("_events", "_held", "_held_sum", "_sum", "_unsettled", "asked_at", "key", "known", "rule")

    def __init__(self, rule: Rule, key: str) -> None:
        self.rule = rule
        self.key = key
        self.known = False
        """Whether the store's rows are in it."""
        self.asked_at = 0.0
        """When they were asked for, in the loop's time."""
        self._events: deque[Event] = deque()  # oldest first
        self._sum = 0
        self._held: dict[UUID, int] = {}
        self._held_sum = 0
        self._unsettled: dict[UUID, Event] = {}

    def inherit(self, rule: Rule) -> None:
        """Go on under a rule that counts the same; what was asked for may not reach to another maximum."""
        self.known = self.known and rule.maximum <= self.rule.maximum
        self.rule = rule

    def used(self, now: float) -> int:
        """Return what counts at `now`, what is held included."""
        events, begin = self._events, now - self.rule.window
        while events and events[0].at <= begin:
            gone = events.popleft()
            self._sum -= gone.amount
            if gone.task_id is not None:
                self._unsettled.pop(gone.task_id, None)
        return self._sum + self._held_sum

    def fits(self, task_id: UUID, amount: int, now: float) -> bool:
        """Whether there is room for `amount` in all by `task_id`, whatever it holds already."""
        return self.used(now) - self._held.get(task_id, 0) + amount <= self.rule.maximum

    def wait(self, task_id: UUID, amount: int, now: float) -> float:
        """Return after how many seconds there will be room for `amount`; what is held counts as sent now."""
        excess = self.used(now) - self._held.get(task_id, 0) + amount - self.rule.maximum
        for event in self._events:
            if excess <= 0:
                break
            excess -= event.amount
            last = event.at
            if excess <= 0:
                return max(0.0, last + self.rule.window - now)
        return self.rule.window if excess > 0 else 0.0

    def hold(self, task_id: UUID, amount: int) -> None:
        """Hold `amount` for a message under way, instead of what it held before; 0 is held as well."""
        self._held_sum += amount - self._held.get(task_id, 0)
        self._held[task_id] = amount

    def holds(self, task_id: UUID) -> int | None:
        """Return what is held for a message; None: nothing ever was."""
        return self._held.get(task_id)

    def release(self, task_id: UUID) -> None:
        """The message was not sent: it does not count."""
        self._held_sum -= self._held.pop(task_id, 0)

    def sent(self, task_id: UUID, at: float, *, settled: bool) -> None:
        """What is held for a message was sent. `settled`: the store has its row from now on."""
        amount = self._held.pop(task_id, 0)
        self._held_sum -= amount
        self.add(Event(at, amount, task_id), settled=settled)

    def add(self, event: Event, *, settled: bool) -> None:
        """Count an event of this relay."""
        if not event.amount:
            return
        self._put(event)
        if not settled and event.task_id is not None:
            self._unsettled[event.task_id] = event

    def settle(self) -> None:
        """The store has the rows of everything that was sent so far."""
        self._unsettled.clear()

    @property
    def unsettled(self) -> tuple[Event, ...]:
        """What was sent and the store may not have."""
        return tuple(self._unsettled.values())

    @property
    def own(self) -> frozenset[UUID]:
        """What the store may have and this count has itself."""
        return frozenset(self._held) | frozenset(self._unsettled)

    @property
    def idle(self) -> bool:
        """Whether it could be asked for anew without losing anything."""
        return not self._held and not self._unsettled

    def replace(self, rows: Iterable[Event], asked_at: float) -> None:
        """Take what the store has instead of what was known of it."""
        own = self.own
        events = [row for row in rows if row.task_id is None or row.task_id not in own]
        events += self._unsettled.values()
        events.sort(key=_at)
        self._events = deque(events)
        self._sum = sum(event.amount for event in events)
        self._shorten()
        self.known, self.asked_at = True, asked_at

    def __len__(self) -> int:
        return len(self._events) + len(self._held)

    def _put(self, event: Event) -> None:
        events = self._events
        if events and events[-1].at > event.at:
            insort(events, event, key=_at)
        else:
            events.append(event)
        self._sum += event.amount
        self._shorten()

    def _shorten(self) -> None:
        if len(self._events) > MAX_EVENTS:
            self._events = deque(_pairs(self._events))


def _at(event: Event) -> float:
    return event.at


def _pairs(events: Iterable[Event]) -> Iterator[Event]:
    """Take neighbours together."""
    each = iter(events)
    for older in each:
        younger = next(each, None)
        yield older if younger is None else Event(younger.at, older.amount + younger.amount)
