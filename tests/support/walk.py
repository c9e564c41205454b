"""Every order of events on a `Stage`, breadth first, up to a depth.

Rules: a stage cannot be copied, so each way is walked from its beginning. Each event is followed by
everything that follows from it by itself, and, in a way of its own, by nothing: the next event then comes in
the same turn of the event loop. Two ways that lead to the same place (`Stage.mark`) are one: what is behind
it is looked at once. At each new place the stage's `finale` is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.stage import Event, Stage

__all__ = [
    "AT_ONCE",
    "DATA",
    "END",
    "MAIL",
    "OPEN",
    "OPEN_IDLE",
    "RECIPIENT",
    "TEXT",
    "BrokenPromiseError",
    "Walk",
    "walk",
]

# The beginnings of many walks.
MAIL = [("client", "mail")]
OPEN = [*MAIL, ("upstream", "dialed"), ("upstream", "2yz")]
OPEN_IDLE = [*MAIL, ("upstream", "2yz")]
RECIPIENT = [("client", "rcpt"), ("upstream", "2yz")]
AT_ONCE = [("client", "rcpt"), ("client", "rcpt"), ("client", "last chunk")]
DATA = [("client", "data"), ("upstream", "354")]
TEXT = [("client", "text")]
END = [("client", "end")]

Step = tuple[Event, bool]
"""An event, and whether what follows from it happens before the next one."""


class BrokenPromiseError(AssertionError):
    """A promise that was broken, and the way that led there."""

    def __init__(self, way: Sequence[Step], error: Exception) -> None:
        shown = ", ".join(f"{who} {what}{'' if quiet else ' &'}" for (who, what), quiet in way)
        super().__init__(f"{type(error).__name__}: {error}\nafter: {shown}\nsteps: {list(way)!r}")
        self.way = tuple(way)


@dataclass
class Walk:
    """How far a walk came."""

    places: int = 0
    steps: int = 0


def walk(make: Callable[[], Stage], opening: Sequence[Event], depth: int) -> Walk:
    """Walk every order of `depth` events behind `opening`; raises BrokenPromiseError."""
    walker = _Walker(make)
    ways = [_Way.begin(make, opening)]
    for _ in range(depth):
        ways = [longer for way in ways for event in way.events for longer in walker.go(way, event)]
    return Walk(len(walker.seen), walker.steps)


@dataclass(frozen=True)
class _Way:
    steps: tuple[Step, ...]
    events: list[Event]
    """What can happen next."""

    @classmethod
    def begin(cls, make: Callable[[], Stage], opening: Sequence[Event]) -> _Way:
        steps = tuple((event, True) for event in opening)
        stage = make()
        for event, quiet in steps:
            stage.do(event, quiet=quiet)
        events = stage.enabled()
        stage.discard()
        return cls(steps, events)


class _Walker:
    def __init__(self, make: Callable[[], Stage]) -> None:
        self._make = make
        self.seen: set[int] = set()
        self.steps = 0

    def go(self, way: _Way, event: Event) -> list[_Way]:
        """Return the ways to new places that begin with `way` and `event`."""
        at_once, after = (*way.steps, (event, False)), (*way.steps, (event, True))
        stage = self._make()
        with _telling(at_once, stage):
            for each, quiet in way.steps:
                stage.redo(each, quiet=quiet)
            stage.do(event, quiet=False)
            more = bool(stage.loop.pending)
            first = self._place(stage, at_once)
        if not more:  # nothing follows from it by itself
            stage.discard()
            return [] if first is None else [first]
        if first is not None:  # the stage has come to its end
            stage = self._make()
            for each, quiet in at_once:
                stage.redo(each, quiet=quiet)
        with _telling(after, stage):
            stage.quiet()
            second = self._place(stage, after)
        stage.discard()
        return [each for each in (first, second) if each is not None]

    def _place(self, stage: Stage, steps: tuple[Step, ...]) -> _Way | None:
        """Bring the stage to its end where no way has led yet, and return this one; None elsewhere."""
        self.steps += 1
        mark = hash(stage.mark())  # the marks themselves would fill the memory
        if mark in self.seen:
            return None
        self.seen.add(mark)
        way = _Way(steps, stage.enabled())
        stage.finale()
        return way


@contextmanager
def _telling(steps: Sequence[Step], stage: Stage) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        stage.discard()
        raise BrokenPromiseError(steps, error) from error
